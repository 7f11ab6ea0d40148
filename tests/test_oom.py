"""What counts as out of memory, what it says, and what it holds."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from oomguard import oom
from oomguard.memory.size import parse_bytes
from oomguard.testing import VirtualCard
from tests.oom_errors import CUDA, OTHER, OUT_OF_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_an_out_of_memory_is_one_whatever_its_type(name: str) -> None:
    facts = oom.classify(OUT_OF_MEMORY[name])
    assert facts is not None
    assert facts.message
    assert "\n" not in facts.message


@pytest.mark.parametrize("name", OTHER)
def test_any_other_error_is_none(name: str) -> None:
    assert oom.classify(OTHER[name]) is None


def test_its_numbers_are_read() -> None:
    facts = oom.classify(OUT_OF_MEMORY["cuda"])
    assert facts is not None
    assert facts.asked_bytes == 20 * 2**20
    assert facts.free_bytes == parse_bytes("12.75 MiB")
    assert facts.total_bytes == parse_bytes("79.11 GiB")
    assert facts.message.startswith("CUDA out of memory. Tried")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("cpu", 8_000_000_000),
        ("cpu on windows", 1536),
        ("mps", 2**28),
        ("xpu", 2**31),
        ("hip", 3 * 2**29),
        ("npu", 52 * 2**20),
        ("huge", None),
        ("bare", None),
        ("python", None),
        ("cublas", None),
    ],
)
def test_what_was_asked_for_is_read_where_it_is_said(name: str, asked: int | None) -> None:
    facts = oom.classify(OUT_OF_MEMORY[name])
    assert facts is not None
    assert (facts.asked_bytes, facts.free_bytes) == (asked, None)


def test_under_a_memory_fraction_what_is_allowed_is_the_limit() -> None:
    # torch.cuda.set_per_process_memory_fraction: 1.50 GiB and 100 MiB of it are taken.
    text = CUDA.replace("12.75 MiB is free", "60.00 GiB is free")
    facts = oom.classify(torch.OutOfMemoryError(text.format(allowed="2.00 GiB allowed; ")))
    assert facts is not None
    assert facts.free_bytes == (512 - 100) * 2**20
    assert facts.total_bytes == parse_bytes("79.11 GiB")
    facts = oom.classify(torch.OutOfMemoryError(text.format(allowed="1.25 GiB allowed; ")))
    assert facts is not None
    assert facts.free_bytes == 0


def test_what_a_virtual_card_says_is_read() -> None:
    with (
        VirtualCard("1MiB"),
        pytest.raises(torch.OutOfMemoryError) as raised,
    ):
        _ = [torch.empty(100 * 2**10, dtype=torch.uint8) for _ in range(11)]
    facts = oom.classify(raised.value)
    assert facts is not None
    assert (facts.asked_bytes, facts.free_bytes) == (100 * 2**10, 24 * 2**10)
    assert facts.total_bytes == 2**20


def test_an_error_that_was_raised_from_one_is_the_users_answer_to_it() -> None:
    error = ValueError("this batch is too long")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert oom.classify(error) is None
    reverse = torch.OutOfMemoryError("CUDA out of memory.")
    reverse.__context__ = ValueError("no value")
    assert oom.classify(reverse) is not None


def failing_step(pinned: list[weakref.ref[torch.Tensor]], depth: int = 2) -> None:
    activation = torch.ones(3)
    pinned.append(weakref.ref(activation))
    if depth:
        failing_step(pinned, depth - 1)
    else:
        raise torch.OutOfMemoryError(CUDA.format(allowed=""))


def failing_chain(pinned: list[weakref.ref[torch.Tensor]], *, explicit: bool) -> None:
    """The error of the card, and another one made of it or met while it was handled."""
    try:
        failing_step(pinned)
    except torch.OutOfMemoryError as error:
        batch = torch.ones(3)
        pinned.append(weakref.ref(batch))
        message = "CUDA error: out of memory"
        if explicit:
            raise RuntimeError(message) from error
        raise RuntimeError(message)  # noqa: B904 - as code does that meets a second one


@pytest.mark.parametrize(
    "fail",
    [
        failing_step,
        partial(failing_chain, explicit=True),
        partial(failing_chain, explicit=False),
    ],
)
@pytest.mark.parametrize("kept", ["nothing", "error", "traceback"])
def test_released_tensors_of_the_failed_frames_are_freed(
    fail: Callable[[list[weakref.ref[torch.Tensor]]], None], kept: str
) -> None:
    pinned: list[weakref.ref[torch.Tensor]] = []
    stored: list[Any] = []
    gc.disable()  # freed by what `release` cuts, not by chance
    try:
        try:
            fail(pinned)
        except RuntimeError as error:
            if kept != "nothing":
                stored.append(error if kept == "error" else error.__traceback__)
            assert any(ref() is not None for ref in pinned)
            oom.release(error)
        assert len(pinned) >= 3
        assert all(ref() is None for ref in pinned)
    finally:
        gc.enable()


def test_a_ring_of_errors_is_released() -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__context__, other.__context__ = other, one
    oom.release(one)
    assert one.__context__ is None
    assert other.__context__ is None
    oom.release(None)
