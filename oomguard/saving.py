"""A checkpoint is whole or absent: it is written beside its place and renamed at the end."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator

# The underscore: the Hub's upload leaves such folders out, and no checkpoint is looked for there.
STAGING = "_oomguard_saving"
_RETIRED = "retired-"


class Staging:
    """Where the parts of a checkpoint are written until all of them are there."""

    def __init__(self) -> None:
        """Start with no checkpoint being written."""
        self._final: Path | None = None
        self._given: str | None = None

    @contextmanager
    def checkpoint(self, final: Path, trainer: Any) -> Iterator[None]:
        """While entered, what `redirect` is asked for `final` goes to a folder beside it.

        The trainer's state is the last part: with it the checkpoint takes its place, before it is
        pushed to the Hub and before older ones are deleted.

        Args:
            final: The checkpoint's own folder.
            trainer: The trainer; its `state` and `args` are read.
        """
        clean(final.parent)
        state = trainer.state
        write = state.save_to_json

        def save_to_json(path: str) -> None:
            if self._final is None or Path(path).parent != final:
                write(path)
                return
            # Upstream looks for the best checkpoint's folder, and this one is not there yet.
            keeps_best = str(getattr(trainer.args.save_strategy, "value", "")) != "no"
            if keeps_best and state.best_global_step == state.global_step:
                state.best_model_checkpoint = self._given or str(final)
            write(self.redirect(path))
            self._commit()
            _rotate(final.parent, trainer)

        self._final, state.save_to_json = final, save_to_json
        try:
            yield
            self._commit()  # by a class that does not write the trainer's state
        finally:
            self._final = self._given = None
            vars(state).pop("save_to_json", None)
            clean(final.parent)

    def redirect(self, path: Any) -> Any:
        """The path to write to in place of `path`."""
        if self._final is None or not isinstance(path, (str, os.PathLike)):
            return path
        place = _place(self._final)
        if Path(path) == self._final:
            self._given = os.fspath(path)
            return str(place)
        return str(place / Path(path).name) if Path(path).parent == self._final else path

    def _commit(self) -> None:
        """Give the checkpoint its name, once all of it is on the disk."""
        if self._final is None or not _place(self._final).is_dir():
            return
        final, place, self._final = self._final, _place(self._final), None
        _sync(place)
        if final.is_dir():  # written before, or partly by the trainer's own class
            _take_over(final, place)
            _retire(final)
        place.rename(final)
        _sync_folder(final.parent)


def _place(final: Path) -> Path:
    """The checkpoint's folder while it is written: of the same name, in the same file system."""
    return final.parent / STAGING / final.name


def clean(folder: Path) -> None:
    """Delete what a process that died left half written."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def can_stage(trainer: Any) -> bool:
    """Whether all parts of this trainer's checkpoints are written by upstream's own code.

    A `_save_checkpoint` that does not call `super()` may write to the checkpoint's folder directly.
    """
    own = [vars(cls).get("_save_checkpoint") for cls in type(trainer).__mro__]
    written = [method for method in own if method is not None][:-1]  # the last is Trainer's
    return all("super" in method.__code__.co_names for method in written)


def _take_over(old: Path, new: Path) -> None:
    """Copy what only the old folder has, as it would have stayed had it been written to."""
    for path in old.rglob("*"):
        target = new / path.relative_to(old)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
            _sync_file(target)


def _retire(folder: Path) -> None:
    """Take a checkpoint's name away at once: deleting takes a while, in which it would be torn."""
    bin_ = folder.parent / STAGING
    bin_.mkdir(exist_ok=True)
    folder.rename(bin_ / f"{_RETIRED}{folder.name}")


def _rotate(run_dir: Path, trainer: Any) -> None:
    """Delete what `save_total_limit` does not keep, so that upstream finds nothing to delete."""
    limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
    if limit is None or limit <= 0:
        return
    checkpoints = _by_age(run_dir)
    kept = {*checkpoints[-1:], *([Path(best)] if best is not None else [])}
    surplus = len(checkpoints) - max(limit, len(kept))
    for checkpoint in [path for path in checkpoints if path not in kept][: max(0, surplus)]:
        _retire(checkpoint)


def _by_age(run_dir: Path) -> list[Path]:
    """Checkpoints in upstream's order: by time, or by step on file systems that keep no time."""
    found = [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    times = {path: path.stat().st_mtime for path in found}
    if max(times.values(), default=0.0) - min(times.values(), default=0.0) >= 1:
        return sorted(found, key=lambda path: (times[path], str(path)))
    steps = [path for path in found if path.name.rpartition("-")[2].isdecimal()]
    return sorted(steps, key=lambda path: int(path.name.rpartition("-")[2]))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        (_sync_folder if path.is_dir() else _sync_file)(path)
    _sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last; not every system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
