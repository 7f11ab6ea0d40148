"""What readings of a GPU say beside leaks; made-up readings, since no GPU is needed for rules."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from oomguard.watch.readings import Reading
from oomguard.watch.symptoms import Room, Symptoms

if TYPE_CHECKING:
    from collections.abc import Callable

    from oomguard.watch.findings import Finding

MIB, GIB = 2**20, 2**30
TOTAL = 12 * GIB
USED: dict[str, int | None] = {
    "allocated_bytes": 4 * GIB,
    "active_bytes": 4 * GIB,
    "reserved_bytes": 8 * GIB,
    "inactive_split_bytes": 500 * MIB,
    "alloc_retries": 0,
    "process_bytes": 9 * GIB,
    "device_used_bytes": 9 * GIB,
    "batch_tokens": 1000,
}


def found(
    at: Callable[[int], dict[str, Any]],
    *,
    steps: int = 400,
    step_s: Callable[[int], float] = lambda _: 0.5,
) -> list[Finding]:
    """What is told of readings that are `USED` but for what `at` says of a step."""
    symptoms = Symptoms(0)
    told: list[Finding] = []
    for step in range(1, steps + 1):
        values: dict[str, Any] = {**USED, **at(step)}
        reading = Reading(step=step, time_s=0.5 * step, **values)
        free = TOTAL - values["device_used_bytes"]
        room = Room(total_bytes=TOTAL, usable_bytes=TOTAL, free_bytes=free)
        told += symptoms.look(reading, room, step_s(step), None)
    return told


def test_nothing_is_told_of_a_run_where_nothing_changes() -> None:
    assert found(lambda _: {}) == []


def reserved(step: int, base: int) -> dict[str, Any]:
    grown = 8 * MIB * step
    outside = base + GIB + grown
    return {
        "reserved_bytes": base + grown,
        "inactive_split_bytes": 500 * MIB + grown,
        "process_bytes": outside,
        "device_used_bytes": outside,
    }


def test_idle_memory_that_grows_on_a_nearly_full_card_is_fragmentation() -> None:
    finding, *again = found(lambda step: reserved(step, 3 * GIB), steps=1000)
    assert {each.kind for each in (finding, *again)} == {"fragmentation"}
    assert finding.bytes_per_step == pytest.approx(8 * MIB, rel=0.05)
    assert "expandable_segments" in str(finding.advice)
    assert "8.00 MiB a step" in finding.message


def test_a_cause_is_told_again_when_it_grew_by_half() -> None:
    told = found(lambda step: reserved(step, 7 * GIB))
    sizes = [finding.bytes_so_far or 0 for finding in told]
    assert len(sizes) > 1
    assert all(later >= 1.5 * earlier for earlier, later in pairwise(sizes))


def test_idle_memory_that_grows_where_there_is_room_is_none() -> None:
    assert found(lambda step: reserved(step, 2 * GIB), steps=300) == []


def test_whole_unused_blocks_are_no_fragmentation() -> None:
    split = {"inactive_split_bytes": 500 * MIB}
    assert found(lambda step: reserved(step, 7 * GIB) | split) == []


def test_memory_of_the_process_that_pytorch_did_not_take_is_outside() -> None:
    def at(step: int) -> dict[str, Any]:
        used = 9 * GIB + 4 * MIB * (step // 20 * 20)  # NVML is asked once a second
        return {"process_bytes": used if step % 20 == 0 else None, "device_used_bytes": used}

    finding, *again = found(at)
    assert {each.kind for each in (finding, *again)} == {"outside"}
    assert "this process holds" in finding.message


def test_where_the_driver_names_no_process_outside_may_be_a_neighbour() -> None:
    finding, *again = found(
        lambda step: {"process_bytes": None, "device_used_bytes": 9 * GIB + 4 * MIB * step}
    )
    assert {each.kind for each in (finding, *again)} == {"outside"}
    assert "this process, or another one on the device" in finding.message


def test_another_process_that_comes_is_a_neighbour() -> None:
    (finding,) = found(lambda step: {"device_used_bytes": (9 if step < 100 else 11) * GIB})
    assert (finding.kind, finding.step) == ("neighbour", 103)
    assert "2.00 GiB more than when the training began" in finding.message


def test_an_allocator_that_retries_at_every_step_is_thrashing() -> None:
    (finding,) = found(lambda step: {"alloc_retries": max(0, step - 50)})
    assert (finding.kind, finding.step) == ("thrashing", 56)


def test_a_retry_now_and_then_is_none() -> None:
    assert found(lambda step: {"alloc_retries": step // 4}) == []


def full(step: int) -> dict[str, Any]:
    return {"device_used_bytes": TOTAL - 100 * MIB, "process_bytes": TOTAL - 100 * MIB}


def test_steps_that_take_longer_since_the_card_is_full_are_spilling() -> None:
    (finding,) = [
        finding
        for finding in found(full, step_s=lambda step: 0.5 if step < 100 else 4.0)
        if finding.kind == "spilling"
    ]
    assert finding.step == 107
    assert "8.0 times as long" in finding.message


@pytest.mark.parametrize(
    ("at", "step_s"),
    [
        (full, lambda _: 4.0),
        (lambda _: {}, lambda step: 0.5 if step < 100 else 4.0),
        (
            lambda step: full(step) | {"batch_tokens": 1000 if step < 100 else 8000},
            lambda step: 0.5 if step < 100 else 4.0,
        ),
    ],
    ids=["slow from the start", "room on the card", "longer batches"],
)
def test_slow_steps_for_another_reason_are_no_spilling(
    at: Callable[[int], dict[str, Any]], step_s: Callable[[int], float]
) -> None:
    assert found(at, step_s=step_s) == []
