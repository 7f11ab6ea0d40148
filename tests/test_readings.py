from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from oomguard.memory import simulated
from oomguard.memory.device import AllocatorStats
from oomguard.testing import VirtualCard
from oomguard.watch.readings import Meter, Reading, allocated_bytes, card_total_bytes, device_name

MIB = 2**20


def stats(peak_allocated_bytes: int, peak_reserved_bytes: int) -> AllocatorStats:
    return AllocatorStats(0, 0, peak_allocated_bytes, peak_reserved_bytes, 0, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be read")
def test_without_a_card_only_the_hosts_memory_is_known() -> None:
    reading = Meter(peaks="step", began_s=100.0).take(3, "save", batch_tokens=8)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    assert reading.host_rss_bytes == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.05)
    assert 100 < reading.time_s < 101
    assert reading == Reading(
        step=3,
        time_s=reading.time_s,
        phase="save",
        batch_tokens=8,
        host_rss_bytes=reading.host_rss_bytes,
    )
    assert (device_name(), card_total_bytes(), allocated_bytes()) == ("cpu", None, None)


def test_a_virtual_card_tells_what_lives_on_it_and_the_peak_since_the_last_reading() -> None:
    meter = Meter(peaks="step")
    with VirtualCard("64MiB") as card:
        kept = torch.zeros(3 * MIB, dtype=torch.uint8)
        torch.zeros(8 * MIB, dtype=torch.uint8)
        first = meter.take(1)
        torch.zeros(2 * MIB, dtype=torch.uint8)
        second, third = meter.take(2), meter.take(3)
        assert (device_name(), card_total_bytes()) == ("VirtualCard", 64 * MIB)
        assert allocated_bytes() == card.live_bytes == kept.nbytes
    assert [row.allocated_bytes for row in (first, second, third)] == [3 * MIB] * 3
    assert [row.peak_allocated_bytes for row in (first, second, third)] == [
        11 * MIB,
        5 * MIB,
        3 * MIB,
    ]
    assert first.reserved_bytes is None
    assert card.peak_bytes == 11 * MIB


def test_a_meter_without_peaks_leaves_those_of_the_card_to_another() -> None:
    with VirtualCard("64MiB"):
        torch.zeros(8 * MIB, dtype=torch.uint8)
        assert Meter().take(1).peak_allocated_bytes is None
        assert Meter(peaks="risen").take(1).peak_allocated_bytes == 8 * MIB


def test_of_nested_cards_the_outermost_is_read_and_none_after_them() -> None:
    with VirtualCard("64MiB") as outer:
        with VirtualCard(fail_at=9) as inner:
            assert simulated.current() is outer
        assert simulated.current() is outer
        assert inner.capacity_bytes is None
    assert simulated.current() is None
    with pytest.raises(torch.OutOfMemoryError), VirtualCard("1KiB"):
        torch.zeros(MIB)
    assert simulated.current() is None


def test_counters_left_alone_tell_a_peak_only_where_it_rose() -> None:
    meter = Meter(peaks="risen")
    found = [meter._peaks_of(stats(*pair)) for pair in [(5, 10), (5, 10), (6, 10), (6, 12)]]
    assert found == [(5, 10), (None, None), (6, None), (None, 12)]
    assert Meter(peaks="none")._peaks_of(stats(5, 10)) == (None, None)


@pytest.mark.gpu
def test_a_gpu_is_read_without_waiting_for_it_and_every_peak_is_of_its_own_time() -> None:
    meter = Meter(peaks="step")
    kept = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    before = meter.take(0)
    del kept
    square = torch.randn(8192, 8192, device="cuda")
    done = torch.cuda.Event()
    for _ in range(50):
        square @ square
    done.record()
    busy = meter.take(1)
    assert not done.query(), "the reading came after the work was done"
    torch.cuda.synchronize()
    calm = meter.take(2)
    assert calm.allocated_bytes == torch.cuda.memory_allocated()
    assert calm.reserved_bytes == torch.cuda.memory_reserved()
    assert calm.peak_allocated_bytes == calm.allocated_bytes
    assert busy.peak_allocated_bytes is not None
    assert busy.peak_allocated_bytes >= 2 * square.nbytes
    assert calm.device_used_bytes is not None
    assert calm.device_used_bytes >= calm.reserved_bytes
    assert calm.process_bytes is None or calm.process_bytes >= calm.reserved_bytes
    assert calm.alloc_retries == before.alloc_retries
    assert card_total_bytes() == torch.cuda.get_device_properties(0).total_memory
