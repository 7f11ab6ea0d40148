"""The model of the caching allocator."""

from __future__ import annotations

import pytest

from oomguard.memory.allocator import CachingAllocator
from oomguard.memory.replay import cases, first_of_process, replay
from oomguard.memory.timeline import RELEASE, Event, Mark, Timeline

MIB = 2**20


def test_small_and_large_requests_get_the_segments_of_pytorch() -> None:
    for nbytes, reserved in (
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB),
    ):
        pool = CachingAllocator()
        assert pool.malloc(0, nbytes)
        assert pool.reserved_bytes == reserved


def test_blocks_are_rounded_split_and_merged() -> None:
    pool = CachingAllocator()
    for key in range(3):
        pool.malloc(key, 1000)
    assert (pool.allocated_bytes, pool.reserved_bytes) == (3 * 1024, 2 * MIB)
    for key in (0, 2, 1):
        pool.free(key)
    pool.malloc(3, MIB)
    pool.malloc(4, MIB)
    assert pool.reserved_bytes == 2 * MIB


def test_of_free_blocks_of_one_size_the_segment_made_last_is_taken() -> None:
    pool = CachingAllocator()
    for key in (0, 1):
        pool.malloc(key, 20 * MIB)
    segments = {key: block.address for key, block in pool._used.items()}
    assert segments[1] < segments[0]
    for key in (0, 1):
        pool.free(key)
    pool.malloc(2, 4 * MIB)
    assert pool._used[2].address == min(segments.values())


def test_a_rest_of_a_mebibyte_stays_with_a_large_block() -> None:
    pool = CachingAllocator()
    pool.malloc(0, 20 * MIB)
    pool.free(0)
    pool.malloc(1, 19 * MIB)
    assert pool.allocated_bytes == 20 * MIB


def test_the_cache_is_released_before_a_request_fails() -> None:
    pool = CachingAllocator(limit_bytes=40 * MIB)
    pool.malloc(0, 30 * MIB)
    pool.free(0)
    assert pool.malloc(1, 36 * MIB)
    assert pool.reserved_bytes == 36 * MIB
    assert not pool.malloc(2, 20 * MIB)


def test_expandable_segments_grow_by_what_is_missing() -> None:
    native, expandable = CachingAllocator(), CachingAllocator(expandable=True)
    for pool in (native, expandable):
        pool.malloc(0, 40 * MIB)
        pool.free(0)
        pool.malloc(1, 60 * MIB)
    assert native.reserved_bytes == 100 * MIB
    assert expandable.reserved_bytes == 60 * MIB


def test_free_pages_of_expandable_segments_are_given_back_and_taken_again() -> None:
    pool = CachingAllocator(expandable=True)
    for key in range(3):
        pool.malloc(key, 40 * MIB)
    pool.free(1)
    pool.release_cached()
    assert pool.reserved_bytes == 80 * MIB
    pool.malloc(3, 40 * MIB)
    assert pool.reserved_bytes == 120 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_a_timeline_says_when_its_peak_is(expandable: bool) -> None:
    events: list[Event] = [
        Mark("load"),
        (0, 20 * MIB),
        Mark("forward"),
        (1, 40 * MIB),
        (1, -1),
        RELEASE,
        (2, 20 * MIB),
    ]
    found = replay(Timeline(events, ["weights"] * 3), expandable=expandable)
    assert found is not None
    assert (found.peak_allocated_bytes, found.phase, found.peak_index) == (60 * MIB, "forward", 3)
    assert found.peak_reserved_bytes == 60 * MIB
    tight = 60 * MIB - 1
    assert replay(Timeline(events, []), expandable=expandable, limit_bytes=tight) is None


def test_workspaces_come_with_the_first_product_of_a_process() -> None:
    events: list[Event] = [Mark("forward"), (0, 8), (1, 16), (2, 32), Mark("backward"), (1, -1)]
    usual = Timeline(events, ["workspaces"] * 3, late=((1, 3), (2, 4)))
    first = first_of_process(usual)
    assert first.events == [Mark("forward"), (0, 8), (2, 32), (1, 16), Mark("backward"), (1, -1)]
    assert first_of_process(first) is first


def test_a_run_fits_only_if_it_does_in_every_case() -> None:
    """A workspace takes a part of a block that is free, and what had the block needs another."""
    mib = 2**20
    events: list[Event] = [Mark("forward"), (0, 32 * mib), (1, 100 * mib), (1, -1)]
    events += [(2, mib // 2), (3, 100 * mib), (3, -1)]
    usual = Timeline(events, ["workspaces", *["saved_activations"] * 3], late=((1, 4),))
    peaks = [one and one.peak_reserved_bytes // mib for one in cases(usual, expandable=False)]
    assert peaks == [134, 202, 134, 202]
    limited = cases(usual, expandable=False, limit_bytes=180 * mib)
    assert [one is not None for one in limited] == [True, False, True, False]


def test_the_lowest_of_equal_blocks_is_taken_wherever_segments_lie() -> None:
    mib = 2**20
    events: list[Event] = [(0, 20 * mib), (1, 20 * mib), (0, -1), (1, -1), (2, 12 * mib)]
    for ascending, left in ((False, 0), (True, 1)):
        pool = CachingAllocator(ascending=ascending)
        for key, nbytes in events[:2]:  # type: ignore[misc]
            pool.malloc(key, nbytes)
        first, second = (pool._used[key].address for key in (0, 1))
        assert (first < second) is ascending
        for key in (0, 1):
            pool.free(key)
        pool.malloc(2, 12 * mib)
        assert pool._used[2].address == (second, first)[left]
