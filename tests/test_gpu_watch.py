from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from trl import SFTConfig

from gpu_checks import watch
from oomguard.watch.findings import Finding
from tests.tiny import takes

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not takes(SFTConfig, "train_sampling_strategy"),
    reason="SFTConfig has no train_sampling_strategy here, which keeps the rows in order",
)


def tables(out: Path, section: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())["sections"][section][
        "tables"
    ]
    return found


def test_what_watching_costs_is_measured_with_tiny_models(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    names = ["overhead", "outside", "fragmentation"]
    assert watch.main(["--tiny", "--sections", *names, "--out", str(out)]) == 0
    (row,) = tables(out, "overhead")["Steps"]
    assert row["steps_each"] > 0
    assert 0 < row["plain_step_s"] < 10 * row["watched_step_s"]


@pytest.mark.slow
def test_what_is_planted_is_reported_with_tiny_models_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert watch.main(["--tiny", "--sections", "nothing", "leak", "--out", str(out)]) == 0
    assert tables(out, "nothing") == {"Findings": []}
    (row,) = tables(out, "leak")["Findings"]
    assert row["kind"] == "leak"
    assert row["per_step_bytes"] == pytest.approx(2**20, rel=0.05)


@pytest.mark.parametrize(
    ("found", "planted"),
    [((), "leak"), (("leak",), None), (("leak", "outside"), "leak"), (("cycles",), "leak")],
)
def test_what_was_not_planted_is_a_failure(found: tuple[Any, ...], planted: Any) -> None:
    findings = [Finding(kind=kind, message="") for kind in found]
    assert len(watch.judged(findings, planted).failures) == 1
    assert watch.judged([Finding(kind="leak", message="")], "leak").failures == []
