"""What fails in a watcher is told once, and not kept."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

from oomguard.watch.quiet import Quiet

if TYPE_CHECKING:
    import pytest


class Held:
    """Stands for the tensors of a frame in which something failed."""


def failed(quiet: Quiet) -> weakref.ref[Held]:
    held = Held()
    with quiet:
        msg = "nothing there"
        raise RuntimeError(msg)
    return weakref.ref(held)


def test_a_handler_that_keeps_its_records_keeps_nothing_of_what_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quiet = Quiet("memory is not read")
    kept = [failed(quiet) for _ in range(2)]
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "memory is not read: RuntimeError: nothing there. Training goes on; this is said once."
    ]
