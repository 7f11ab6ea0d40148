"""`oomguard estimate`: from the options of the command line to an estimate."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from oomguard.errors import ConfigurationError
from oomguard.memory.cards import Card
from oomguard.memory.size import format_bytes
from oomguard.prediction.estimate import estimate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oomguard.prediction.result import Estimate


def run(model: str, card: str | None, options: dict[str, Any]) -> Estimate:
    """The estimate of the options, under a progress bar where standard error is a terminal.

    Raises:
        ConfigurationError: They cannot work, or the card cannot hold the weights alone.
    """
    with _progress():
        found = estimate(model, card=card, **options)
    usable_bytes, weights_bytes = found.card.usable_bytes, found.breakdown["weights"]
    if usable_bytes is not None and weights_bytes > usable_bytes:
        msg = (
            f"the weights alone take {format_bytes(weights_bytes)}, and {Card.of(card).name} has "
            f"{format_bytes(usable_bytes)} beside CUDA's context: (a) quantize the base "
            "(--quantization nf4), (b) take a smaller model, or (c) a larger card"
        )
        raise ConfigurationError(msg)
    return found


@contextmanager
def _progress() -> Iterator[None]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        bar.add_task("tracing two optimizer steps")
        yield
