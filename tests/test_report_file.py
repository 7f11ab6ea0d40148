"""The report as a file for programs: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_utils import TrainOutput

from oomguard.errors import ConfigurationError
from oomguard.report import SCHEMA, Report
from oomguard.rung import Fidelity
from oomguard.rungs import SplitBatch
from tests.reports import EVENT, PLAN, full_report, recovery

if TYPE_CHECKING:
    from pathlib import Path


def damaged_recovery(**fields: Any) -> dict[str, Any]:
    """A recovery as JSON types, with a few of its fields replaced."""
    return asdict(recovery(SplitBatch())) | fields


def saved_with(folder: Path, field: str, value: object) -> Path:
    path = folder / "report.json"
    full_report().save(path)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {field: value}), "utf-8")
    return path


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
