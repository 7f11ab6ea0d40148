"""The check of found plans on a GPU, with tiny models on `VirtualCard`s."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from transformers import LlamaConfig
from trl import SFTConfig

from gpu_checks import find
from oomguard.search import Finder
from tests.tiny import takes

if TYPE_CHECKING:
    from pathlib import Path

CASE = "full"

pytestmark = pytest.mark.skipif(
    not takes(SFTConfig, "train_sampling_strategy", "activation_checkpointing"),
    reason="the checks are written for a newer transformers",
)


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> find.Row:
    model, settings = find.TINY_CASES[CASE]
    asked = {"per_device_train_batch_size": 1, **settings}
    finder = Finder(LlamaConfig(**model), "tokens", (), asked)
    folder = str(tmp_path_factory.mktemp("model"))
    find.saved({"case": CASE, "folder": folder})
    return {**find.planned(CASE, "96MiB", finder, tiny=True), "folder": folder}


def test_a_found_plan_fits_its_card_and_fills_it(row: find.Row) -> None:
    found = find.measure(row)
    assert found["fitted"]
    assert find.ENOUGH < found["share"] <= 1.0
    assert found["peak_allocated_bytes"] <= row["estimated_allocated_bytes"]


def test_a_plan_too_large_for_its_card_is_a_failure(row: find.Row) -> None:
    smaller = {**row, "card_bytes": row["estimated_allocated_bytes"] // 2}
    found = {**smaller, **find.measure(smaller)}
    assert not found["fitted"]
    (said,) = find.failures([found])
    assert said.startswith("full on 96MiB: CUDA out of memory")


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.5, ["only 50.0%"]), (1.01, ["101.0%"]), (0.95, [])],
)
def test_how_much_of_the_card_is_in_use_is_judged(share: float, said: list[str]) -> None:
    row: dict[str, Any] = {"case": CASE, "card": "8GiB", "tiny": False, "fitted": True}
    failed = find.failures([{**row, "share": share}])
    wanted = [f"full on 8GiB: {text} of the card were in use" for text in said]
    assert failed == wanted


def test_a_training_that_takes_too_long_is_ended(row: find.Row) -> None:
    found = find.spawned("train", row, timeout_s=0.01)
    assert found["ended_by"] == "0 s were over"


@pytest.mark.slow
def test_everything_found_is_trained_and_written_down(tmp_path: Path) -> None:
    out = tmp_path / "find.json"
    assert find.main(["--tiny", "--cases", CASE, "--cards", "96MiB", "--output", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["fitted"]
    assert row["device_bytes"] <= row["card_bytes"]
