"""`oomguard find`: the largest plan for one card, or for the sizes that cards have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from oomguard.errors import NothingFitsError
from oomguard.search import Finder
from oomguard.search_result import COLUMNS, row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from oomguard.search_result import SearchResult

CARDS = ("8GiB", "12GiB", "16GiB", "24GiB", "40GiB", "48GiB", "80GiB")

Found = dict[str, "SearchResult | NothingFitsError"]


def find(
    model: str,
    card: str | None,
    *,
    maximize: str,
    free: Sequence[str],
    settings: dict[str, Any],
) -> Found:
    """Search on one card, or on all of `CARDS`, with a progress bar where a terminal is.

    Returns:
        By card what was found, or why nothing fits it.

    Raises:
        NothingFitsError: Nothing fits the card, or none of them.
        ConfigurationError: The model or a setting is wrong.
    """
    cards = CARDS if card is None else (card,)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    found: Found = {}
    with bar:
        task = bar.add_task("reading the model", total=len(cards))
        finder = Finder(model, maximize, free, settings)
        for name in cards:
            bar.update(task, description=f"searching for {name}")
            try:
                found[name] = finder.on(name)
            except NothingFitsError as error:
                found[name] = error
            bar.advance(task)
    failures = [one for one in found.values() if isinstance(one, NothingFitsError)]
    if len(failures) == len(found):
        raise failures[-1]
    return found


def as_json(found: Found) -> dict[str, Any]:
    """One result as it is; of several that of the smallest card with one, and all of them."""
    every = [
        {"card": card, "error": str(one)} if isinstance(one, NothingFitsError) else one.to_dict()
        for card, one in found.items()
    ]
    first = next(one for one in every if "plan" in one)
    return first if len(every) == 1 else {**first, "cards": every}


def as_table(found: Found) -> RenderableType:
    """One result with its code; of several a line each."""
    if len(found) == 1:
        (only,) = found.values()
        return only  # type: ignore[return-value]
    table = Table("card", *COLUMNS[:-1], box=box.SIMPLE_HEAD, show_edge=False)
    for card, one in found.items():
        if isinstance(one, NothingFitsError):
            table.add_row(card, "nothing fits")
        else:
            table.add_row(escape(card), *row(one.plan, one.estimate, one.measured)[:-1])
    return table
