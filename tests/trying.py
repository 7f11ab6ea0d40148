"""Trainers to try plans on, and a trial on a `VirtualCard`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from oomguard.levers.live import read_plan
from oomguard.testing import VirtualCard
from oomguard.trial import Trial, run_trial
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.plan import Plan

ROOMY = "1 GiB"

CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one row a pass": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "all rows in one pass": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "8-bit moments": {"optim": "paged_adamw_8bit"},
    "half the rank": {"lora_r": 2},
    "fewer adapters": {"target_modules": ("q_proj", "v_proj")},
    "shorter rows": {"max_length": 48},
}


def sft(folder: Path, **changes: Any) -> Any:
    """An SFTTrainer with dropout that evaluates, logs and saves."""
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    values = {
        "lora": lora,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "trainer_arguments": {"eval_dataset": tiny.text_dataset(6)},
    }
    return tiny.sft_trainer(folder, **{**values, **changes})


def short(folder: Path) -> Any:
    """One layer, one batch a step: few allocations."""
    return tiny.sft_trainer(
        folder,
        model=tiny.llama(num_hidden_layers=1),
        lora=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1),
        gradient_accumulation_steps=1,
        save_strategy="steps",
        eval_strategy="steps",
        trainer_arguments={"eval_dataset": tiny.text_dataset(4)},
    )


def tried(trainer: Any, plan: Plan | None = None, **card: Any) -> tuple[Trial, int]:
    """A trial on a card, and how many allocations it took."""
    with VirtualCard(**(card or {"capacity_bytes": ROOMY})) as virtual:
        virtual.track(trainer.model)
        before = virtual.live_bytes
        trial = run_trial(trainer, plan or read_plan(trainer))
        assert virtual.live_bytes == before, "something of the trial stays on the card"
        return trial, virtual.allocations


def changed(trainer: Any, name: str) -> Plan:
    return replace(read_plan(trainer), **CHANGES[name])
