"""The report: one line a recovery in the log, a table for people, a file for programs."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers.trainer_utils import TrainOutput

from oomguard.errors import ConfigurationError
from oomguard.event import OOMEvent
from oomguard.plan import Plan
from oomguard.report import SCHEMA, Recovery, Report, installed_versions
from oomguard.rung import Fidelity, Rung
from oomguard.rungs import CheckpointActivations, HalveSequence, SplitBatch
from tests.runs import report_of, write_run

if TYPE_CHECKING:
    from pathlib import Path

MIB, GIB = 2**20, 2**30
PLAN = Plan(per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=2048)
EVENT = OOMEvent(
    phase="backward",
    step=12,
    micro_batch=1,
    rows=8,
    width=2048,
    tokens=8 * 2048,
    asked_bytes=3 * GIB // 2,
    free_bytes=512 * MIB,
    total_bytes=12 * GIB,
    message='CUDA out of memory. Tried to allocate [1.50] GiB "\u2026"',
)


def recovery(rung: Rung | None, before: Plan = PLAN, event: OOMEvent = EVENT) -> Recovery:
    after = before if rung is None else rung(before, event)
    assert after is not None
    return Recovery(
        event=event,
        rung=None if rung is None else rung.name,
        fidelity=None if rung is None else rung.fidelity,
        before=before,
        after=after,
        seconds_lost=0.42,
    )


def full_report() -> Report:
    """A run that met an unexplained failure and then took every rung."""
    rows = [recovery(None, event=replace(EVENT, phase="optimizer", free_bytes=None))]
    for rung in (CheckpointActivations(), HalveSequence(), SplitBatch()):
        before = rows[-1].after
        event = replace(EVENT, step=100 + len(rows), width=before.max_length)
        rows.append(recovery(rung, before, replace(event, tokens=8 * (before.max_length or 0))))
    return Report(
        initial_plan=PLAN,
        plan=rows[-1].after,
        ladder=("CheckpointActivations", "HalveSequence", "SplitBatch"),
        recoveries=rows,
        train_output=TrainOutput(200, 1.25, {"train_loss": 1.25, "epoch": 1.0}),
        status="finished",
        seconds=63.5,
    )


def damaged_recovery(**fields: Any) -> dict[str, Any]:
    """A recovery as JSON types, with a few of its fields replaced."""
    return asdict(recovery(SplitBatch())) | fields


def rendered(report: Report, width: int) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(report)
    return console.export_text()


def saved_with(folder: Path, field: str, value: object) -> Path:
    path = folder / "report.json"
    full_report().save(path)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {field: value}), "utf-8")
    return path


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


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report, path = full_report(), tmp_path / "not" / "yet" / "there.json"
    report.save(path)
    loaded = Report.load(path)
    assert loaded == report
    assert isinstance(loaded.train_output, TrainOutput)
    assert all(isinstance(row.fidelity, Fidelity) for row in loaded.recoveries[1:])


NAMES = st.text(max_size=8)
METRICS = st.dictionaries(NAMES, st.floats() | st.integers(), max_size=3)
REPORTS = st.builds(
    replace,
    st.builds(full_report),
    ladder=st.lists(NAMES).map(tuple),
    status=st.sampled_from(["running", "finished", "failed", "interrupted"]),
    error=st.none() | st.text(),
    versions=st.dictionaries(NAMES, NAMES, max_size=3),
    started=st.integers(0, 2**32).map(lambda s: datetime.fromtimestamp(s / 8, UTC)),
    seconds=st.floats(0, 1e9),
    train_output=st.none() | st.builds(TrainOutput, st.integers(0, 2**53), st.floats(), METRICS),
)


@given(REPORTS)
def test_any_report_survives_its_file_not_finite_metrics_included(
    tmp_path_factory: pytest.TempPathFactory, report: Report
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_report.json"
    report.save(path)
    # repr: nan differs from itself, and 1 is equal to 1.0.
    assert repr(Report.load(path)) == repr(report)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_valid_json(tmp_path: Path, value: float) -> None:
    path = tmp_path / "report.json"
    replace(full_report(), train_output=TrainOutput(3, value, {"grad_norm": value})).save(path)
    output = json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)["train_output"]
    assert output["training_loss"] == output["metrics"]["grad_norm"] == str(value)


def test_metrics_that_are_no_numbers_do_not_cost_the_report(tmp_path: Path) -> None:
    odd: dict[str, Any] = {"tensor": torch.zeros(2), "list": [1.0, math.nan]}
    metrics = {"grad_norm": torch.tensor(0.5), "bad": torch.tensor(math.inf), **odd}
    replace(full_report(), train_output=TrainOutput(3, 1.0, metrics)).save(tmp_path / "r.json")
    output = Report.load(tmp_path / "r.json").train_output
    kept: dict[str, Any] = {"tensor": "tensor([0., 0.])", "list": [1.0, "nan"]}
    assert output == TrainOutput(3, 1.0, {"grad_norm": 0.5, "bad": math.inf, **kept})


def test_whoever_reads_while_a_report_is_saved_gets_the_whole_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    full_report().save(path)
    with path.open() as reader:
        replace(full_report(), status="failed").save(path)
        assert json.load(reader)["status"] == "finished"


def test_a_write_that_fails_halfway_leaves_the_old_report_and_nothing_else(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path, old = tmp_path / "report.json", full_report()
    old.save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            replace(old, status="failed").save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Report.load(path) == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("schema", ["oomguard.report/2", "other", 1, None])
def test_another_schema_is_refused_with_path_expected_and_found(
    tmp_path: Path, schema: object
) -> None:
    path = saved_with(tmp_path, "schema", schema)
    with pytest.raises(ConfigurationError) as caught:
        Report.load(path)
    assert f"{path}: expected schema {SCHEMA!r}, found {schema!r}" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]", b"null", b'"oomguard"'])
def test_a_file_that_is_no_report_is_refused_by_path_and_expected_schema(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        Report.load(path)
    assert all(words in str(caught.value) for words in (str(path), SCHEMA))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "done"),
        ("plan", {"per_device_train_batch_size": 0}),
        ("plan", {"rows": 1}),
        ("initial_plan", None),
        ("recoveries", [{}]),
        ("recoveries", 3),
        ("started", "yesterday"),
        ("train_output", {"loss": 1}),
        ("train_output", {"global_step": 3, "training_loss": 10**400, "metrics": {}}),
        ("train_output", {"global_step": "3", "training_loss": math.nan, "metrics": {}}),
        ("seconds", "long"),
        ("seconds", math.inf),
        ("started", "0001-01-01T00:00:00"),
        ("ladder", [1]),
        ("versions", {"torch": 2.11}),
        ("estimate", [1]),
        ("error", 3),
        ("plan", PLAN.to_dict() | {"optim": 8}),
        ("recoveries", [damaged_recovery(event=vars(EVENT) | {"step": "12"})]),
        ("recoveries", [damaged_recovery(event=vars(EVENT) | {"asked_bytes": 10**400})]),
        ("recoveries", [damaged_recovery(seconds_lost=None)]),
    ],
)
def test_a_damaged_field_is_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match="its content is not a report's"):
        Report.load(saved_with(tmp_path, field, value))


def test_the_versions_are_those_installed() -> None:
    versions = installed_versions()
    assert versions["python"].startswith("3.")
    assert versions["torch"] == torch.__version__
