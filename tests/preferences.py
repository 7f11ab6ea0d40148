"""TRL's preference trainers on real text, in steps of 2 x 4 pairs or rows."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import LlamaForSequenceClassification, set_seed
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from tests import tiny
from tests.twin import SMALL

if TYPE_CHECKING:
    from pathlib import Path

VALUES: dict[str, Any] = {
    **SMALL,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": 64,
}


@cache
def pairs() -> Dataset:
    """A prompt, its true continuation, and that of another text; their lengths vary."""
    rows, texts = [], tiny.texts()
    for index in range(20):
        text, other = texts[index], texts[index + 20]
        chosen = text[30 : 60 + 25 * (index % 3)]
        rows.append({"prompt": text[:30], "chosen": chosen, "rejected": other[30:90]})
    return Dataset.from_list(rows)


@cache
def margins() -> Dataset:
    """The same pairs as whole texts, with how much better the first is."""
    return Dataset.from_list(
        [
            {
                "chosen": row["prompt"] + row["chosen"],
                "rejected": row["prompt"] + row["rejected"],
                "margin": 0.1 * (index % 3),
            }
            for index, row in enumerate(pairs())
        ]
    )


@cache
def labelled() -> Dataset:
    """Every second row good, but the first four all good: some passes have one kind only."""
    rows = []
    for index, row in enumerate(pairs()):
        label = index < 4 or index % 2 == 0
        completion = row["chosen" if label else "rejected"]
        rows.append({"prompt": row["prompt"], "completion": completion, "label": label})
    return Dataset.from_list(rows)


def dpo(folder: Path, *, reference: str = "adapters", **changes: Any) -> DPOTrainer:
    """A DPOTrainer; `reference` is `"adapters"` (switched off), `"precomputed"` or `"model"`."""
    if reference == "precomputed":
        changes["precompute_ref_log_probs"] = True
    return DPOTrainer(
        model=tiny.llama(),
        ref_model=tiny.llama() if reference == "model" else None,
        args=DPOConfig(**{**VALUES, "output_dir": str(folder), **changes}),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        peft_config=None if reference == "model" else copy.deepcopy(tiny.LORA),
    )


def reward(folder: Path, *, dataset: Dataset | None = None, **changes: Any) -> RewardTrainer:
    """A RewardTrainer on all weights."""
    set_seed(0)
    return RewardTrainer(
        model=LlamaForSequenceClassification(tiny.config(num_labels=1)),
        args=RewardConfig(**{**VALUES, "output_dir": str(folder), **changes}),
        train_dataset=pairs() if dataset is None else dataset,
        processing_class=tiny.tokenizer(),
    )


def kto(folder: Path, **changes: Any) -> KTOTrainer:
    """A KTOTrainer whose loss needs no estimate from the whole batch."""
    values = {**VALUES, "loss_type": "apo_zero_unpaired", "desirable_weight": 1.5}
    return KTOTrainer(
        model=tiny.llama(),
        args=KTOConfig(**{**values, "output_dir": str(folder), **changes}),
        train_dataset=labelled(),
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(tiny.LORA),
    )
