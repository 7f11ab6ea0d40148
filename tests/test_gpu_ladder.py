"""The walk down the ladder that is measured on a GPU, with tiny models."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig

from gpu_checks import ladder
from gpu_checks.quantized import to_nf4
from gpu_checks.walk import watching
from oomguard.levers.live import Levers
from tests import tiny as models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Row = dict[str, Any]


pytestmark = [pytest.mark.slow, models.needs(SFTConfig, "train_sampling_strategy")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the whole script finds with tiny models, and its exit code."""
    out = tmp_path_factory.mktemp("tiny") / "rows.json"
    gc.collect()
    gc.freeze()  # a recovery collects garbage, which takes long with everything imported
    code = ladder.main(["--tiny", "--out", str(out)])
    yield {"code": code, **json.loads(out.read_text())}
    gc.unfreeze()


def rows(found: dict[str, Any], section: str, table: str) -> list[Row]:
    return list(found["sections"][section]["tables"][table])


def test_everything_that_must_hold_holds_with_tiny_models(tiny: dict[str, Any]) -> None:
    failures = {name: section["failures"] for name, section in tiny["sections"].items()}
    assert failures == {"ladder": [], "paged": [], "exact": []}
    assert tiny["code"] == 0


def test_every_rung_is_taken_alone_in_its_order_until_none_is_left(tiny: dict[str, Any]) -> None:
    assert [row["rung"] for row in rows(tiny, "ladder", "Rungs")] == [
        "CheckpointActivations",
        "HalveSequence",
        *["SplitBatch"] * 2,
        "PageOptimizer8bit",
        *["NarrowTargets"] * 5,
        "LowerRank",
    ]
    (end,) = rows(tiny, "ladder", "End")
    assert end["ended_by"].startswith("LadderExhaustedError")


def test_each_rung_begins_with_what_was_measured_before_it(tiny: dict[str, Any]) -> None:
    (start,) = rows(tiny, "ladder", "As it was")
    walked = rows(tiny, "ladder", "Rungs")
    peaks = [start["peak_bytes"], *(row["peak_after_bytes"] for row in walked)]
    assert peaks[:-1] == [row["peak_before_bytes"] for row in walked]
    assert all(row["steps"] >= 1 and row["tokens_a_second_after"] > 0 for row in walked)
    assert all(0 <= row["apply_s"] < row["lost_s"] for row in walked)
    halved, split = walked[1], walked[2]
    assert halved["peak_after_bytes"] < 0.6 * halved["peak_before_bytes"]
    assert split["peak_after_bytes"] < 0.6 * split["peak_before_bytes"]


def test_8_bit_moments_make_the_peak_smaller(tiny: dict[str, Any]) -> None:
    for row in rows(tiny, "paged", "Outside of PyTorch"):
        assert row["tensors_after_bytes"] < 0.8 * row["tensors_before_bytes"]


def test_watching_ends_with_its_block() -> None:
    own = Levers.apply
    with watching(lambda _: None, lambda: None):
        assert Levers.apply is not own
    assert Levers.apply is own


def test_a_model_quantized_in_memory_is_the_one_that_transformers_loads(tmp_path: Path) -> None:
    plain = models.llama()
    plain.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    )
    made = to_nf4(plain, torch.float32)
    theirs, ours = loaded.state_dict(), made.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    for name in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        assert getattr(made, name) == getattr(loaded, name)
    assert made.config.quantization_config.to_dict() == config.to_dict()
    assert type(made.hf_quantizer) is type(loaded.hf_quantizer)
    kinds = [[type(module) for module in model.modules()] for model in (made, loaded)]
    assert kinds[0] == kinds[1]
    requires = [[p.requires_grad for p in model.parameters()] for model in (made, loaded)]
    assert requires[0] == requires[1]


@pytest.mark.gpu
def test_paged_memory_is_given_back(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert ladder.main(["--sections", "paged", "--out", str(out)]) == 0
    assert rows(json.loads(out.read_text()), "paged", "Outside of PyTorch")
