"""What may fail under a callback that watches: places that cannot be written, cards not read."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from oomguard.memory import simulated

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """Nobody may write to the folder, this process included."""
    folder.chmod(0o555)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o755)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """No file may grow beyond a kibibyte."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def file_in_the_way(folder: Path) -> Iterator[None]:
    """The output directory has become a file."""
    folder.rmdir()
    folder.touch()
    yield


@contextmanager
def no_parquet(folder: Path) -> Iterator[None]:
    """The package that writes the file cannot be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        yield


WRITING = [no_permission, full_disk, file_in_the_way, no_parquet]


class Broken:
    """A card that cannot be read."""

    capacity_bytes = None

    @property
    def allocated_bytes(self) -> int:
        msg = "the driver is gone"
        raise RuntimeError(msg)

    @property
    def peak_bytes(self) -> int:
        return self.allocated_bytes

    def take_peak(self) -> int:
        return self.allocated_bytes


@contextmanager
def unreadable_card() -> Iterator[None]:
    """The card in force cannot be read."""
    card = Broken()
    simulated.enter(card)
    try:
        yield
    finally:
        simulated.leave(card)
