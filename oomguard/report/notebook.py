"""A report in a notebook: once in a cell, though it is told of twice there."""

from __future__ import annotations

import builtins


def cell() -> int | None:
    """The number of the cell that runs now; `None` outside of a notebook."""
    get_ipython = getattr(builtins, "get_ipython", None)  # IPython puts it there
    shell = None if get_ipython is None else get_ipython()
    return None if shell is None else int(shell.execution_count)


def display(html: str) -> None:
    """Put HTML below the cell."""
    from IPython.display import HTML
    from IPython.display import display as below

    below(HTML(html))
