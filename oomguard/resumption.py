"""From which checkpoint an interrupted training goes on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

STATE_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
OPTIMIZER_NAMES = ("optimizer.pt", "optimizer.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written to its end.

    Attributes:
        path: Its folder.
        step: Optimizer steps made.
        ended: Whether these were all steps of the training.
        exact: Whether it holds the optimizer; without it training cannot go on as it was.
    """

    path: Path
    step: int
    ended: bool
    exact: bool


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; `None` where it was not written to its end.

    The Trainer writes `trainer_state.json` last.
    """
    name = _NAME.fullmatch(path.name)
    try:
        state = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
        step, last = int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if name is None or int(name[1]) != step:
        return None
    files = {entry.name for entry in path.iterdir()}
    exact = "scheduler.pt" in files and not files.isdisjoint(OPTIMIZER_NAMES)
    return Checkpoint(path, step, ended=0 < last <= step, exact=exact)


def written(output_dir: str | Path) -> dict[str, int]:
    """Names of all checkpoint folders and when each was written to its end (ns; 0: it was not)."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return {}
    times = {}
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and path.is_dir():
            state = path / STATE_NAME
            times[path.name] = state.stat().st_mtime_ns if state.exists() else 0
    return times


def last_checkpoint(output_dir: str | Path, stale: Mapping[str, int]) -> Checkpoint | None:
    """The furthest checkpoint to go on from, or `None`.

    Args:
        output_dir: The Trainer's.
        stale: What `written` gave before the training began: checkpoints of another run that have
            not been written anew since then do not count.
    """
    found = [
        read_checkpoint(Path(output_dir) / name)
        for name, time_ns in written(output_dir).items()
        if stale.get(name) != time_ns
    ]
    usable = [one for one in found if one is not None and (one.exact or one.ended)]
    return max(usable, key=lambda one: one.step, default=None)
