"""Training setups as users write them, on a small model: TRL's defaults, and plain Trainers."""

from __future__ import annotations

import copy
from functools import cache
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import torch
import transformers as tf
from datasets import Dataset, disable_progress_bars
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests import tiny
from tests.kinds import make
from tests.preferences import pairs

if TYPE_CHECKING:
    from pathlib import Path

disable_progress_bars()
# Large enough for bitsandbytes to hold moments in 8 bits.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 1}
NF4 = tf.BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)


@cache
def saved() -> str:
    """A folder with a model in bfloat16."""
    folder, model = mkdtemp(), half(tiny.llama(**WIDE))
    model.save_pretrained(folder)
    return folder


def half(model: Any) -> Any:
    """The model in bfloat16, as if it had been loaded so."""
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model


def load(**changes: Any) -> Any:
    """The saved model; in the type it was saved in, as transformers does by default."""
    return tf.AutoModelForCausalLM.from_pretrained(saved(), **changes)


def load_4bit() -> Any:
    """The saved model in NF4."""
    return load(quantization_config=NF4, dtype=torch.bfloat16)


def small(**changes: Any) -> Any:
    """A narrow model of four layers and few tokens, in float32."""
    values = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 64}
    return tiny.llama(**{**values, **changes})


def rows(width: int, padded_to: int = 0, count: int = 32) -> list[dict[str, Any]]:
    """Rows of so many tokens, and empty ones up to `padded_to`."""
    empty = max(0, padded_to - width)
    ids = [[5 + (7 * row + column) % 50 for column in range(width)] for row in range(count)]
    return [
        {
            "input_ids": row + [0] * empty,
            "labels": row + [-100] * empty,
            "attention_mask": [1] * width + [0] * empty,
        }
        for row in ids
    ]


def sft(
    folder: Path,
    model: Any = None,
    *,
    lora: Any = tiny.LORA,
    data: Any = None,
    own: dict[str, Any] | None = None,
    **changes: Any,
) -> SFTTrainer:
    """An SFTTrainer as TRL has it by default; `own` is its own, `changes` those of its config."""
    return SFTTrainer(
        model=load() if model is None else model,
        args=SFTConfig(output_dir=str(folder), **QUIET, **changes),
        train_dataset=tiny.text_dataset() if data is None else Dataset.from_list(data),
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(lora),
        **(own or {}),
    )


def qlora(folder: Path) -> SFTTrainer:
    """The same on a base in 4 bits."""
    return sft(folder, load_4bit())


def dpo(folder: Path) -> DPOTrainer:
    """A DPOTrainer as TRL has it by default."""
    return DPOTrainer(
        model=load(),
        args=DPOConfig(output_dir=str(folder), **QUIET),
        train_dataset=pairs(),
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(tiny.LORA),
    )


def plain(folder: Path, model: Any = None, *, data: Any = None, **changes: Any) -> Any:
    """A Trainer of all weights of a small model in bfloat16, without checkpointing."""
    values = {
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "bf16": True,
        "collator": tf.default_data_collator,
        **changes,
    }
    return make(
        folder,
        model=half(small()) if model is None else model,
        rows=rows(64) if data is None else data,
        **values,
    )


def evaluating(trainer: Any, count: int = 32) -> Any:
    """The trainer with an evaluation set of rows of 64 tokens."""
    trainer.eval_dataset = Dataset.from_list(rows(64, count=count))
    return trainer
