"""Real trainers on real text, small enough to run in a second."""

from __future__ import annotations

import copy
import inspect
import pydoc_data.topics
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from trl import DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

# The form that TRL's assistant_only_loss needs: the end of a turn is trained too.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_CHECKPOINTING = ("checkpointing", "checkpointing_kwargs")
LORA = LoraConfig(
    r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
)


@cache
def texts() -> tuple[str, ...]:
    """Paragraphs of the Python language reference, of very different lengths."""
    topics: dict[str, str] = pydoc_data.topics.topics
    paragraphs = [part for text in topics.values() for part in text.split("\n\n")]
    return tuple(part.strip() for part in paragraphs if len(part) > 80)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 tokens, trained on the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.train_from_iterator(
        texts()[:400],
        trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<eos>"]),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def config(**changes: Any) -> LlamaConfig:
    """A Llama of two layers."""
    values: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**values, **changes})


def deep_config(**changes: Any) -> LlamaConfig:
    """A Llama of more layers than a trace keeps."""
    values = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 9}
    return config(**{**values, **changes})


def llama(**changes: Any) -> LlamaForCausalLM:
    """The Llama with the same random weights every time."""
    set_seed(0)
    return LlamaForCausalLM(config(**changes))


def text_dataset(rows: int = 32) -> Dataset:
    """Plain text."""
    return Dataset.from_dict({"text": list(texts()[:rows])})


def prompt_dataset(rows: int = 32) -> Dataset:
    """Prompt and completion: the first third of a paragraph, and the rest."""
    pairs = [(text[: len(text) // 3], text[len(text) // 3 :]) for text in texts()[:rows]]
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}
"""Steps of 2 x 4 rows on the CPU, every one of them logged."""


def takes(function: Callable[..., Any], *arguments: str) -> bool:
    """Whether the installed version of a function or class has arguments of these names."""
    return set(arguments) <= inspect.signature(function).parameters.keys()


def needs(function: Callable[..., Any], *arguments: str) -> pytest.MarkDecorator:
    """Skips a test where the oldest supported versions lack these arguments."""
    missing = f"{function.__name__} has no {' and '.join(arguments)} here"
    return pytest.mark.skipif(not takes(function, *arguments), reason=missing)


needs_rows_of_pairs = pytest.mark.skipif(
    not hasattr(DPOTrainer, "_compute_loss"),
    reason="TRL's trainers other than SFT lay out their batches otherwise here",
)
needs_fused_head = pytest.mark.skipif(
    not hasattr(utils, "add_fused_lm_head"),
    reason="TRL makes all logits here, which no estimate models",
)
needs_activation_checkpointing = needs(TrainingArguments, "activation_checkpointing")


def as_named_here(arguments: dict[str, Any]) -> dict[str, Any]:
    """Training arguments under the names that the installed transformers has for them."""
    if takes(TrainingArguments, "activation_checkpointing"):
        return arguments
    old = {f"activation_{name}": f"gradient_{name}" for name in _CHECKPOINTING}
    return {old.get(name, name): value for name, value in arguments.items()}


def sft_config(output_dir: Path, **changes: Any) -> SFTConfig:
    """Four optimizer steps of 2 x 4 rows."""
    values: dict[str, Any] = {
        **ARGUMENTS,
        "output_dir": str(output_dir),
        "max_steps": 4,
        "max_length": 96,
        "learning_rate": 1e-2,
        "bf16": False,
        "activation_checkpointing": False,
    }
    return SFTConfig(**as_named_here({**values, **changes}))


def sft_trainer(
    output_dir: Path,
    *,
    lora: LoraConfig | None = LORA,
    dataset: Dataset | None = None,
    model: Any = None,
    trainer_class: type[SFTTrainer] = SFTTrainer,
    trainer_arguments: dict[str, Any] | None = None,
    **changes: Any,
) -> SFTTrainer:
    """An SFTTrainer; `changes` go to its `SFTConfig`."""
    model = llama() if model is None else model
    return trainer_class(
        model=model,
        args=sft_config(output_dir, **changes),
        train_dataset=text_dataset() if dataset is None else dataset,
        processing_class=tokenizer(),
        peft_config=copy.deepcopy(lora),  # PEFT writes what "all-linear" was into it
        **(trainer_arguments or {}),
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all trained weights."""
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def logged(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """The named values of every log line that has them all."""
    return [
        tuple(line[name] for name in names)
        for line in trainer.state.log_history
        if all(name in line for name in names)
    ]
