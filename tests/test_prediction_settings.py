"""Estimates of int8, DoRA and offloading against peaks measured on an H100."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

from benchmarks.prediction import DATA, estimated, rows_of
from tests.tiny import needs_fused_head


@needs_fused_head
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_measured_peak_of_int8_is_met(checkpointing: bool) -> None:
    assert_met({"quantization": "int8"}, gradient_checkpointing=checkpointing)


@needs_fused_head
def test_a_measured_peak_of_dora_with_checkpointing_is_met() -> None:
    assert_met({"quantization": "nf4", "use_dora": True})


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"),
    reason="this transformers cannot offload",
)
def test_a_measured_peak_with_offloaded_checkpoints_is_met() -> None:
    assert_met({}, offload_activations=True)


@needs_fused_head
def test_a_measured_peak_of_a_batch_that_is_padding_to_a_third_is_met() -> None:
    share = {"padded": True, "target_share": 0.624625}
    assert_met(share, gradient_checkpointing=False)
    row = row_of(share, gradient_checkpointing=False)
    full = estimated({**row, "settings": {"padded": True}})
    assert full.peak_allocated_bytes > 1.02 * row["peak_allocated_bytes"]


def row_of(settings: dict[str, Any], **plan: Any) -> dict[str, Any]:
    return next(
        row
        for row in rows_of(DATA / "h100-settings.json")
        if row["settings"] == settings and plan.items() <= row["plan"].items()
    )


def assert_met(settings: dict[str, Any], **plan: Any) -> None:
    row = row_of(settings, **plan)
    found = estimated(row)
    assert (found.method, found.notes) == ("traced", ())
    assert found.peak_allocated_bytes == pytest.approx(row["peak_allocated_bytes"], rel=0.01)
    assert found.peak_reserved_bytes == pytest.approx(row["peak_reserved_bytes"], rel=0.03)
