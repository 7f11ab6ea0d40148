from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from oomguard.errors import ConfigurationError
from oomguard.watch.readings import PHASES, Reading
from oomguard.watch.series import Breakdown, Series

if TYPE_CHECKING:
    from pathlib import Path

FULL = Reading(
    step=7,
    time_s=1.5,
    phase="eval",
    allocated_bytes=1,
    reserved_bytes=2**40,
    peak_allocated_bytes=3,
    peak_reserved_bytes=4,
    active_bytes=5,
    inactive_split_bytes=6,
    alloc_retries=7,
    process_bytes=8,
    device_used_bytes=9,
    batch_tokens=10,
    host_rss_bytes=11,
)
BREAKDOWNS = [
    Breakdown(step=1, weights_bytes=8, gradients_bytes=8, optimizer_bytes=16, other_bytes=None),
    Breakdown(step=2, weights_bytes=8, gradients_bytes=0, optimizer_bytes=16, other_bytes=3),
]


def series_of(*readings: Reading) -> Series:
    series = Series("NVIDIA H100", 80 * 2**30)
    for reading in readings:
        series.add(reading)
    return series


def peaks(readings: list[Reading], phase: str) -> tuple[Any, ...]:
    rows = [row for row in readings if row.phase == phase]
    pairs = [(row.peak_allocated_bytes, row.peak_reserved_bytes) for row in rows]
    return tuple(
        max((peak for peak in column if peak is not None), default=None)
        for column in zip(*pairs, strict=True)
    )


def test_a_file_holds_what_was_read_and_a_missing_reading_is_null(tmp_path: Path) -> None:
    readings = [Reading(step=7, time_s=1.0, allocated_bytes=0), FULL]
    series = series_of(*readings)
    for entry in BREAKDOWNS:
        series.add_breakdown(entry)
    path = tmp_path / "new" / "series.parquet"
    series.save(path)
    loaded = Series.load(path)
    assert loaded.readings == readings
    assert loaded.breakdowns == BREAKDOWNS
    assert (loaded.device, loaded.card_total_bytes) == ("NVIDIA H100", 80 * 2**30)
    table = parquet.read_table(path)
    assert table["reserved_bytes"].to_pylist() == [None, 2**40]
    kinds = {"phase": pa.string(), "time_s": pa.float64()}
    assert all(field.type == kinds.get(field.name, pa.int64()) for field in table.schema)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_empty_series_is_a_file_too(tmp_path: Path) -> None:
    Series().save(tmp_path / "series.parquet")
    loaded = Series.load(tmp_path / "series.parquet")
    assert (loaded.readings, loaded.device, loaded.card_total_bytes) == ([], "cpu", None)


@pytest.mark.parametrize("kind", ["text", "cut", "table"])
def test_another_kind_of_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "series.parquet"
    series_of(FULL).save(path)
    if kind == "table":
        parquet.write_table(pa.table({"step": [1]}), path)
    else:
        path.write_bytes(b"step,time\n1,2\n" if kind == "text" else path.read_bytes()[:-9])
    with pytest.raises(ConfigurationError, match=r"series\.parquet: not a series of memory"):
        Series.load(path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Series.load(tmp_path / "series.parquet")


sizes = st.none() | st.integers(0, 2**45)
entries = st.tuples(st.sampled_from(PHASES), sizes, sizes, sizes)


@settings(max_examples=30, deadline=None)
@given(st.lists(entries, min_size=1, max_size=40), st.sampled_from([1, 400]), st.integers(0, 15999))
def test_thinning_loses_no_peak_and_ends_with_the_latest_reading(
    entries: list[tuple[Any, Any, Any, Any]], times: int, spike: int
) -> None:
    readings = [
        Reading(
            step=number,
            time_s=float(number),
            phase=phase,
            allocated_bytes=allocated,
            peak_allocated_bytes=2**46 if number == 1 + spike % (len(entries) * times) else peak,
            peak_reserved_bytes=reserved,
        )
        for number, (phase, allocated, peak, reserved) in enumerate(entries * times, 1)
    ]
    kept = series_of(*readings).readings
    assert len(kept) <= 4096
    assert [row.step for row in kept] == sorted({row.step for row in kept})
    by_step = {row.step: row for row in readings}
    for row in kept:
        same = by_step[row.step]
        assert (row.phase, row.allocated_bytes) == (same.phase, same.allocated_bytes)
    for phase in {row.phase for row in readings}:
        assert peaks(kept, phase) == peaks(readings, phase)
        of_phase = [row for row in kept if row.phase == phase]
        assert of_phase[-1].step == max(row.step for row in readings if row.phase == phase)


def test_few_readings_are_all_kept_and_many_stand_for_equally_many_each() -> None:
    few = [Reading(step=step, time_s=float(step)) for step in range(1, 3073)]
    assert series_of(*few).readings == few
    many = [Reading(step=step, time_s=float(step)) for step in range(1, 20_001)]
    assert [row.step for row in series_of(*many).readings] == [*range(8, 20_001, 8)]


def test_a_run_that_goes_on_keeps_what_was_before_its_checkpoint_and_stays_bounded() -> None:
    series = series_of(*(Reading(step=step, time_s=float(step)) for step in range(1, 3001)))
    for entry in BREAKDOWNS:
        series.add_breakdown(entry)
    resumed = Series("cpu", 7)
    assert resumed.time_s == 0
    resumed.go_on(series, 1)
    assert resumed.time_s == 1
    assert [row.step for row in resumed.readings] == [1]
    assert resumed.breakdowns == BREAKDOWNS[:1]
    assert (resumed.device, resumed.card_total_bytes) == ("cpu", 7)
    resumed.go_on(series, 2999)
    for step in range(3000, 9000):
        resumed.add(Reading(step=step, time_s=float(step)))
    steps = [row.step for row in resumed.readings]
    assert steps == sorted(set(steps))
    assert len(steps) <= 3072
    assert steps[-1] == 8999


def test_a_file_with_more_rows_than_are_kept_now_loses_no_reading_and_no_peak() -> None:
    earlier, series = Series(), Series()
    earlier._phases["train"].rows = [
        Reading(step=step, time_s=float(step), peak_allocated_bytes=-step) for step in range(7001)
    ]
    series.go_on(earlier, 7000)
    series.add(Reading(step=7001, time_s=7001.0, peak_allocated_bytes=-7001))
    kept = series.readings
    assert len(kept) <= 3072
    assert kept[-2].step == 7000
    assert [kept[0].peak_allocated_bytes, kept[-1].step] == [0, 7001]


def test_breakdowns_stay_bounded() -> None:
    series = Series()
    for _ in range(100):
        series.add_breakdown(BREAKDOWNS[0])
    assert len(series.breakdowns) == 64


def test_a_failed_write_leaves_the_older_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "series.parquet"
    series_of(FULL).save(path)
    before = path.read_bytes()
    resource = pytest.importorskip("resource")
    longer = series_of(*(Reading(step=step, time_s=float(step)) for step in range(3000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="too large"):
            longer.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
