"""Estimates of trainings on the CPU are what a `VirtualCard` counts, to the byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

from oomguard import estimate
from oomguard.testing import VirtualCard
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

IDS = list(range(3, 99))
ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "optim": "adamw_torch",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def plain(model: Any, rows: int, **arguments: Any) -> Trainer:
    columns = {"input_ids": IDS, "labels": IDS, "attention_mask": [1] * len(IDS)}
    return Trainer(
        model=model,
        args=TrainingArguments(**ON_CPU, **arguments),
        train_dataset=Dataset.from_dict({name: [row] * rows for name, row in columns.items()}),
        data_collator=default_data_collator,
    )


def sft(model: Any, rows: int, **arguments: Any) -> SFTTrainer:
    return SFTTrainer(
        model=model,
        args=SFTConfig(**ON_CPU, bf16=False, max_length=len(IDS), **arguments),
        train_dataset=Dataset.from_dict({"input_ids": [IDS] * rows}),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.LORA,
    )


@tiny.needs_fused_head
@pytest.mark.parametrize(
    ("kind", "rows"), [("full", 12), ("LoRA", 8), ("accumulated", 16), ("SFT", 12)]
)
def test_the_virtual_card_measures_what_is_predicted(kind: str, rows: int, tmp_path: Path) -> None:
    model: Any = tiny.llama(num_hidden_layers=7, hidden_size=64, intermediate_size=256)
    more: dict[str, Any] = {"output_dir": str(tmp_path)}
    if kind == "LoRA":
        model = peft.get_peft_model(model, tiny.LORA)
    if kind == "accumulated":
        more |= {"gradient_accumulation_steps": 2}
    trainer: Any = sft(model, rows, **more) if kind == "SFT" else plain(model, rows, **more)
    found = estimate(trainer, card="host")
    with VirtualCard(capacity_bytes="1GiB") as card:
        card.track(trainer.model)
        trainer.train()
    assert found.method == "traced"
    assert found.peak_allocated_bytes == card.peak_bytes
    assert found.peak_reserved_bytes == card.peak_bytes
