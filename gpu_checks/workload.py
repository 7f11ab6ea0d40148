"""What is trained: Llamas with random weights, on real text in batches of chosen row lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from gpu_checks.quantized import to_nf4
from gpu_checks.text import cut, tokenizer
from oomguard import CheckpointActivations, HalveSequence, Ladder, SplitBatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import TrainerCallback

_LOSS_COLUMNS = 32768  # TRL projects on that many vocabulary entries at once
PRECISION = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_190M = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TINY_FULL = TINY | {"hidden_size": 128, "intermediate_size": 512}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run.

    Attributes:
        model: Arguments of `LlamaConfig`.
        load: What the model is loaded in, a key of `PRECISION` or `"nf4"`.
        train: Mixed precision of the training; `"fp32"` and `"fp64"` are none.
        lora: Whether adapters are trained on all linear layers instead of all weights.
        batches: Row lengths of every loaded batch, in the order of training.
        accumulation: Loaded batches of one optimizer step.
        optim: `TrainingArguments.optim`.
        on_cpu: Whether to train on the CPU.
        rank: Of the adapters.
    """

    model: dict[str, Any]
    load: str
    train: str
    lora: bool
    batches: tuple[tuple[int, ...], ...]
    accumulation: int
    optim: str
    on_cpu: bool
    rank: int = 16

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.batches) // self.accumulation

    def build(self, folder: Path, callbacks: list[TrainerCallback]) -> CheckedTrainer:
        """See `build_trainer`."""
        return build_trainer(self, folder, callbacks)


@dataclass(frozen=True)
class Scale:
    """How large the jobs are: as on a GPU, or tiny on the CPU."""

    tiny: bool

    @property
    def rows(self) -> int:
        """`per_device_train_batch_size` of LoRA jobs."""
        return 4 if self.tiny else 8

    @property
    def width(self) -> int:
        """The longest row of LoRA jobs, in tokens."""
        return 64 if self.tiny else 2048

    @property
    def loss_bytes(self) -> int:
        """What TRL's loss takes for a moment, however small the vocabulary.

        A tiny model is dwarfed by it, so that limits on one must leave room for it.
        """
        return self.rows * self.width * _LOSS_COLUMNS * 8 if self.tiny else 0

    def ladder(self, name: str) -> Ladder | str:
        """The preset of that name; tiny rows are below the floor of its `HalveSequence`."""
        if not self.tiny or name != "default":
            return name
        return Ladder(CheckpointActivations(), HalveSequence(floor=self.width // 4), SplitBatch())

    def lora(self, kinds: str, *, train: str = "bf16", accumulation: int = 1) -> Job:
        """LoRA r=16 on all linear layers of the Llama-3.2-1B shape, without checkpointing.

        Args:
            kinds: One word a batch: `full` rows, `ragged` rows below one full one, or `short` ones.
            train: Mixed precision, which the base is loaded in as well.
            accumulation: Loaded batches of one optimizer step.
        """
        lengths = {
            "full": lambda _: self.width,
            "ragged": lambda draw: draw.randint(self.width // 4, self.width),
            "short": lambda draw: draw.randint(self.width // 8, self.width // 2),
        }
        batches = []
        for position, kind in enumerate(kinds.split()):
            drawn = map(lengths[kind], [random.Random(position)] * self.rows)  # noqa: S311 - lengths
            first = (self.width,) if kind == "ragged" else ()
            batches.append((*first, *drawn)[: self.rows])
        train = "fp64" if self.tiny else train
        return Job(
            model=TINY if self.tiny else LLAMA_1B,
            load=train,
            train=train,
            lora=True,
            batches=tuple(batches),
            accumulation=accumulation,
            optim="adamw_torch_fused",
            on_cpu=self.tiny,
        )

    def qlora(self, steps: int) -> Job:
        """LoRA r=64 on all linear layers of the Llama-3-8B shape in NF4, without checkpointing."""
        return Job(
            model=TINY if self.tiny else LLAMA_8B,
            load="nf4",
            train="fp32" if self.tiny else "bf16",
            lora=True,
            batches=((self.width,) * 4,) * steps,
            accumulation=1,
            optim="adamw_torch_fused",
            on_cpu=self.tiny,
            rank=16 if self.tiny else 64,
        )

    def full(self, steps: int) -> Job:
        """All weights in fp32, passes far smaller than the model, AdamW over lists of tensors."""
        rows = (16,) if self.tiny else (128, 128)
        return Job(
            model=TINY_FULL if self.tiny else LLAMA_190M,
            load="fp64" if self.tiny else "fp32",
            train="fp64" if self.tiny else "bf16",
            lora=False,
            batches=(rows,) * steps,
            accumulation=1,
            optim="adamw_torch",
            on_cpu=self.tiny,
        )


class CheckedTrainer(SFTTrainer):
    """An `SFTTrainer` that can be interrupted between forward and backward.

    Attributes:
        after_forward: Called once, after the forward pass of optimizer step `at_step`.
    """

    after_forward: Callable[[], None] | None = None
    at_step: int = 2

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, as ever."""
        loss = super().compute_loss(*args, **kwargs)
        if self.after_forward is not None and self.state.global_step + 1 == self.at_step:
            interrupt, self.after_forward = self.after_forward, None
            interrupt()
        return loss


def build_trainer(job: Job, folder: Path, callbacks: list[TrainerCallback]) -> CheckedTrainer:
    """A trainer of `job` with a fresh model; the same weights every time."""
    vocabulary = 512 if job.on_cpu else 8192
    rows = cut(vocabulary, [length for batch in job.batches for length in batch])
    trainer = CheckedTrainer(
        model=model(job),
        args=_arguments(job, folder),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer(vocabulary),
        peft_config=_adapters(job.rank) if job.lora else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(job: Job, folder: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(job.batches[0]),
        gradient_accumulation_steps=job.accumulation,
        max_steps=job.steps,
        max_length=max(max(batch) for batch in job.batches),
        learning_rate=1e-4,
        optim=job.optim,
        train_sampling_strategy="sequential",
        activation_checkpointing=False,
        bf16=job.train == "bf16",
        fp16=job.train == "fp16",
        use_cpu=job.on_cpu,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _adapters(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def model(job: Job) -> Any:
    """The model of `job` on its device; the same weights every time."""
    config = LlamaConfig(
        **job.model,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        max_position_embeddings=131072,
    )
    set_seed(0)
    compute = PRECISION[job.train if job.load == "nf4" else job.load]
    with torch.device("cpu" if job.on_cpu else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=compute)
    return to_nf4(model, compute) if job.load == "nf4" else model
