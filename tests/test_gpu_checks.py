from __future__ import annotations

import gc
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from trl import SFTConfig

from gpu_checks import recover, trainers
from gpu_checks.card import VirtualSession
from gpu_checks.sections import SECTIONS, Bench, Comparison, Result
from gpu_checks.trial import Trial
from gpu_checks.workload import Scale
from tests.tiny import takes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Row = dict[str, Any]


# In RLOO the logits of a tiny model, made in sampling already, outweigh all that a rung saves.
OTHERS = sorted(set(trainers.SECTIONS) - {"kto", "rloo"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the whole script finds with tiny models, and its exit code."""
    if not takes(SFTConfig, "train_sampling_strategy"):
        pytest.skip("SFTConfig has no train_sampling_strategy here, which keeps the rows in order")
    folder = tmp_path_factory.mktemp("tiny")
    out, markdown = folder / "rows.json", folder / "tables.md"
    gc.collect()
    gc.freeze()  # a recovery collects garbage, which takes long with everything imported
    code = recover.main(["--tiny", "--out", str(out), "--markdown", str(markdown)])
    yield {"code": code, **json.loads(out.read_text()), "markdown": markdown.read_text()}
    gc.unfreeze()


def rows(found: dict[str, Any], section: str, table: str) -> list[Row]:
    return list(found["sections"][section]["tables"][table])


def test_everything_that_must_hold_holds_with_tiny_models(tiny: dict[str, Any]) -> None:
    failures = {name: section["failures"] for name, section in tiny["sections"].items()}
    assert failures == {name: [] for name in SECTIONS}
    assert tiny["code"] == 0


def test_under_a_limit_only_the_guard_finishes(tiny: dict[str, Any]) -> None:
    runs = rows(tiny, "limits", "Runs")
    assert [run["run"] for run in runs if run["ended_by"]] == ["no guard, 75%"]
    assert {run["steps_lost"] for run in runs if run["recoveries"]} == {0}


def test_exact_rungs_end_with_the_weights_of_the_twin_and_semantic_ones_do_not(
    tiny: dict[str, Any],
) -> None:
    for measure in ("weights_apart", "updates_apart"):
        apart = {run["run"]: run[measure] for run in rows(tiny, "limits", "Runs")}
        assert apart["exact_first, 75%"] < 1e-11
        assert apart["default, 75%"] > 1e-3


def test_memory_runs_out_in_the_middle_of_a_window(tiny: dict[str, Any]) -> None:
    assert {row["micro_batch"] for row in rows(tiny, "limits", "Recoveries")} == {1}


def test_memory_runs_out_in_backward(tiny: dict[str, Any]) -> None:
    assert rows(tiny, "fp16", "Recoveries")[0]["phase"] == "backward"


def test_what_does_not_fit_in_the_optimizer_is_computed_on_the_host(tiny: dict[str, Any]) -> None:
    assert {row["phase"] for row in rows(tiny, "optimizer", "Recoveries")} == {"optimizer"}
    assert rows(tiny, "optimizer", "Runs")[1]["operations_moved_to_host"] == 2  # steps 2 and 3


def test_nothing_is_left_of_a_recovery(tiny: dict[str, Any]) -> None:
    levels = rows(tiny, "left-over", "Live bytes")
    assert [row["left_over_bytes"] for row in levels] == [0, 0, 0]
    assert [row["more_than_no_guard_bytes"] for row in levels] == [0, 0, 0]
    assert min(row["trained_bytes"] for row in levels) > 0


def test_the_markdown_says_how_it_was_made_and_holds_every_row(tiny: dict[str, Any]) -> None:
    top = tiny["markdown"].partition("\n## ")[0]
    assert tiny["command"] in top
    assert tiny["date"] in top
    assert f"torch {torch.__version__}" in top
    for name, section in tiny["sections"].items():
        text = tiny["markdown"].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for title, table in section["tables"].items():
            lines = text.partition(f"### {title}\n\n")[2].partition("\n\n")[0].splitlines()
            assert len(lines) == len(table) + 2
            assert all(line.startswith("| ") for line in lines)


def crash(_: Bench) -> Result:
    msg = "on purpose"
    raise RuntimeError(msg)


def test_a_section_that_crashes_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(SECTIONS, "crash", crash)
    monkeypatch.setitem(SECTIONS, "empty", lambda _: Result())
    out = tmp_path / "rows.json"
    assert recover.main(["--tiny", "--sections", "crash", "empty", "--out", str(out)]) == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["crash"]["failures"] == ["crashed: RuntimeError: on purpose"]
    assert sections["empty"]["failures"] == []


def trial(steps: int, weight: float) -> Trial:
    return Trial(
        steps=steps,
        losses=[1.0] * steps,
        initial={"weight": np.array([0.0])},
        weights={"weight": np.array([weight])},
        step_s=[],
        peak_allocated_bytes=100,
        peak_reserved_bytes=None,
        last_peak_allocated_bytes=100,
        optimizer_ooms=0,
        loss_scale=None,
        report=None,
        error=None,
        trained_bytes=0,
    )


@pytest.mark.parametrize(
    ("found", "limit_bytes", "failure"),
    [
        (trial(1, 1.0), 100, "1 steps lost"),
        (trial(2, 1.1), 100, "updates 0.1 apart"),
        (trial(2, math.nan), 100, "updates nan apart"),
        (trial(2, 1.0), 99, "100 bytes of 99 bytes in use"),
        (trial(2, 1.0), 100, "memory never ran out"),
    ],
)
def test_what_must_not_be_is_a_failure(found: Trial, limit_bytes: int, failure: str) -> None:
    job = Scale(tiny=True).lora("full full")
    compared = Comparison(job, trial(2, 1.0), floor=0.0, update_floor=0.0, result=Result())
    compared.judge("run", found, limit_bytes)
    assert any(failure in text for text in compared.result.failures)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
@pytest.mark.parametrize(
    "section",
    ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
def test_other_trainers_end_like_their_twins_with_tiny_models(section: str, tmp_path: Path) -> None:
    if not takes(SFTConfig, "activation_checkpointing"):
        pytest.skip("the checks are written for a newer transformers")
    out = tmp_path / "rows.json"
    code = trainers.main(["--tiny", "--sections", section, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["sections"][section]["failures"] == []
    assert code == 0
    runs = rows(found, section, "Runs")
    assert runs[-1]["recoveries"] > 0
    assert runs[-1]["updates_apart"] < 1e-11


def test_a_squeezed_card_has_only_the_spare_bytes_until_it_is_left() -> None:
    with VirtualSession() as session:
        kept = torch.zeros(1024)
        session.squeeze(4096)
        more = torch.zeros(1024)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1024)
        assert (session.ooms, session.live_bytes, session.peaks()) == (1, 8192, (8192, None))
        del more
        session.limit(None)
        assert torch.zeros(10**6).sum() == kept.sum()


@pytest.mark.gpu
def test_a_real_oom_in_backward_under_fp16_is_recovered(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert recover.main(["--sections", "fp16", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert rows(found, "fp16", "Recoveries")[0]["phase"] == "backward"
