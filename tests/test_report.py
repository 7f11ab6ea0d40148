"""The report: one line a recovery in the log, and a table for people."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from oomguard.report import Report, installed_versions
from oomguard.rungs import SplitBatch
from tests.reports import EVENT, GIB, PLAN, full_report, recovery
from tests.runs import report_of, write_run

if TYPE_CHECKING:
    from pathlib import Path


def rendered(report: Report, width: int) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(report)
    return console.export_text()


def test_a_recovery_is_one_line_of_log() -> None:
    assert recovery(SplitBatch()).log_line() == (
        "step 12: out of memory in backward (asked 1.50 GiB, free 512.00 MiB): SplitBatch (exact), "
        "8 x 4 -> 4 x 8 passes, effective batch 32 unchanged; step 12 redone, 0.4 s lost"
    )


def test_a_recovery_without_a_rung_says_that_nothing_was_changed() -> None:
    assert recovery(None).log_line() == (
        "step 12: out of memory in backward (asked 1.50 GiB, free 512.00 MiB): released memory and "
        "tried again, plan unchanged; step 12 redone, 0.4 s lost"
    )


@pytest.mark.parametrize(
    ("sizes", "readings"),
    [((None, None), ""), ((GIB // 2, None), " (asked 512.00 MiB)"), ((None, 0), " (free 0 bytes)")],
)
def test_unknown_readings_are_left_out(sizes: tuple[int | None, ...], readings: str) -> None:
    event = replace(EVENT, asked_bytes=sizes[0], free_bytes=sizes[1])
    assert f"in backward{readings}: SplitBatch" in recovery(SplitBatch(), event=event).log_line()


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_pass_that_failed_is_redone(phase: str) -> None:
    line = recovery(SplitBatch(), event=replace(EVENT, phase=phase)).log_line()
    assert f"out of memory in {phase} (" in line
    assert line.endswith("; step 12 redone, 0.4 s lost")


@pytest.mark.parametrize("phase", ["fetch", "clip", "optimizer", "bookkeeping"])
def test_outside_the_passes_nothing_had_to_be_redone(phase: str) -> None:
    line = recovery(SplitBatch(), event=replace(EVENT, phase=phase)).log_line()
    assert line.endswith("; step 12 continued, 0.4 s lost")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_tells_what_happened_what_it_cost_and_what_is_left(width: int) -> None:
    text = rendered(full_report(), width)
    assert text.startswith("oomguard: 4 recoveries, effective batch 32 unchanged\n")
    for name in ("step", "phase", "asked", "free", "rung", "fidelity", "change", "lost"):
        assert name in text
    for cell in (
        *("12", "101", "103", "optimizer", "backward", "1.50 GiB", "512.00 MiB", "0.4 s"),
        *("released memory", "plan unchanged", "CheckpointActivations", "exact"),
        *("gradient_checkpointing off", "HalveSequence", "semantic", "max_length 2048 -> 1024"),
        *("SplitBatch", "8 x 4 -> 4 x 8 passes"),
    ):
        assert cell in text
    assert "\nlost: 1.7 s, 0 steps\nplan: 8 x 4 -> 4 x 8 passes, max_length 2048 -> 1024" in text
    assert "None" not in text


@pytest.mark.parametrize("width", [80, 100, 110, 120, 200])
def test_the_table_stays_inside_its_width_and_loses_no_text(width: int) -> None:
    text = rendered(full_report(), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "\u2026" not in text
    assert sum(line.endswith("0.4 s") for line in text.splitlines()) == 4


def test_a_log_without_colour_or_unicode_gets_plain_ascii() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as file:
        Console(file=file, width=80, force_terminal=False).print(full_report())
        file.flush()
        assert b"\x1b" not in raw.getvalue()
        assert b"SplitBatch" in raw.getvalue()


@pytest.mark.parametrize("width", [80, 112, 200])
def test_a_run_that_was_watched_shows_its_memory_in_a_line(tmp_path: Path, width: int) -> None:
    report = Report.load(write_run(tmp_path / "run") / "oomguard.json")
    line = rendered(report, width).splitlines()[-1]
    assert line.startswith("memory: ████")
    assert line.endswith("▅▅  peak 11.51 GiB of 12.00 GiB")
    assert len(line) <= width
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=width).print(report)  # raises where a mark is not ASCII
    assert rendered(report_of(), width).splitlines()[-1].startswith("plan: ")


def test_a_series_that_cannot_be_read_does_not_cost_the_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "oomguard_vram.parquet").unlink()
    (folder / "oomguard_vram.parquet").mkdir()
    assert "memory:" not in rendered(Report.load(folder / "oomguard.json"), 80)


def test_one_recovery_is_singular_and_its_name_is_not_taken_for_markup() -> None:
    row = replace(recovery(SplitBatch()), rung="partial([bold]f)")
    text = rendered(Report(initial_plan=PLAN, plan=row.after, ladder=(), recoveries=[row]), 120)
    assert text.startswith("oomguard: 1 recovery, effective batch 32 unchanged\n")
    assert "partial([bold]f)" in text


def test_a_run_that_met_nothing_is_one_line_that_knows_a_plan_it_resumed_on() -> None:
    report = Report(initial_plan=PLAN, plan=PLAN, ladder=("SplitBatch",), status="finished")
    assert rendered(report, 80) == "oomguard: no out-of-memory error; nothing was changed\n"
    report.plan = replace(PLAN, max_length=512)
    assert rendered(report, 80) == "oomguard: no out-of-memory error; max_length 2048 -> 512\n"


def test_a_run_that_did_not_finish_says_why_and_claims_nothing_for_a_failed_step() -> None:
    report = replace(full_report(), status="failed", error="no rung was left")
    text = rendered(report, 80)
    assert "\nfailed: no rung was left\n" in text
    assert "0 steps" not in text
    assert "\ninterrupted" in rendered(replace(report, status="interrupted"), 80)
    bare = replace(report, recoveries=[], plan=PLAN)
    assert "failed without a recovery: no rung was left; nothing was" in rendered(bare, 80)


def test_the_versions_are_those_installed() -> None:
    versions = installed_versions()
    assert versions["python"].startswith("3.")
    assert versions["torch"] == torch.__version__
