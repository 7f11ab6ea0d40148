"""The code that a search hands out: it runs, and makes what the plan says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from trl import SFTConfig

from oomguard.plan import Plan
from oomguard.prediction.settings import Settings
from oomguard.snippet import snippet

PLAN = Plan(
    per_device_train_batch_size=3,
    gradient_accumulation_steps=4,
    max_length=2000,
    gradient_checkpointing=True,
    optim="paged_adamw_8bit",
    target_modules=("q_proj", "v_proj"),
    lora_r=24,
)
FULL = replace(PLAN, lora_r=None, target_modules=None, optim="adamw_torch_fused")


def executed(plan: Plan, settings: Settings, **arguments: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    exec(snippet(plan, settings, **arguments), made)  # noqa: S102 - what a user does with it
    return made


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        (PLAN, Settings(quantization="nf4")),
        (PLAN, Settings(quantization="fp4", double_quant=False, dtype="float16")),
        (PLAN, Settings(quantization="int8", use_dora=True, lora_dropout=0.1)),
        (PLAN, Settings(trainer="trainer", mixed_precision="bf16")),
        (replace(PLAN, target_modules=("all-linear",)), Settings(packing=True, use_rslora=True)),
        (FULL, Settings(dtype="float32", mixed_precision="no", attn_implementation="eager")),
        (replace(FULL, gradient_checkpointing=False), Settings(trainer="trainer")),
        (PLAN, Settings(checkpoint_every_n_layers=2, expandable_segments=True, max_grad_norm=0.5)),
    ],
)
def test_the_code_makes_the_configurations_of_the_plan(
    plan: Plan, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # which the code may set
    made = executed(plan, settings)
    args = made["args"]
    assert args.per_device_train_batch_size == plan.per_device_train_batch_size
    assert args.gradient_accumulation_steps == plan.gradient_accumulation_steps
    assert args.gradient_checkpointing == plan.gradient_checkpointing
    assert args.optim == plan.optim
    assert isinstance(args, SFTConfig) == (settings.trainer == "sft")
    assert getattr(args, "max_length", plan.max_length) == plan.max_length
    assert made["model_kwargs"]["dtype"] is getattr(torch, settings.dtype)
    assert ("quantization_config" in made["model_kwargs"]) == settings.is_quantized
    if plan.lora_r is None:
        assert "peft_config" not in made
    else:
        assert made["peft_config"].r == 24
        assert made["peft_config"].lora_alpha == 48


def test_the_code_says_how_the_base_is_quantized() -> None:
    quantized = executed(PLAN, Settings(quantization="fp4", double_quant=False))
    config = quantized["quantization_config"]
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", False)
    assert executed(PLAN, Settings(quantization="int8"))["quantization_config"].load_in_8bit


def test_an_adapter_that_is_there_keeps_its_scaling() -> None:
    assert executed(PLAN, Settings(), lora_alpha=16)["peft_config"].lora_alpha == 16


def test_offloading_is_part_of_checkpointing() -> None:
    code = snippet(replace(PLAN, offload_activations=True), Settings())
    assert '"offload": True' in code
