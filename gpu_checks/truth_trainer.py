"""The trainers of `gpu_checks.truth`, built as a user builds them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from gpu_checks.truth_runs import batch_lengths

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings


STEPS = 6  # of which the first is slower than the others


class Peaks(TrainerCallback):
    """What the allocator counts in each optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin to count."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Add a row."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        row: dict[str, Any] = {"sec": time.perf_counter() - self._began}
        if torch.cuda.is_available():
            stats = torch.cuda.memory_stats()
            row["peak_alloc"] = stats["allocated_bytes.all.peak"]
            row["peak_reserved"] = stats["reserved_bytes.all.peak"]
            row["peak_requested"] = stats["requested_bytes.all.peak"]
            row["end_alloc"] = stats["allocated_bytes.all.current"]
            row["retries"] = stats["num_alloc_retries"]
        self.rows.append(row)


def loaded(folder: Path, settings: Settings) -> Any:
    """The model of `folder` as the settings say."""
    quantization = None
    if settings.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif settings.is_quantized:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=settings.attn_implementation,
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    if settings.prepare_for_kbit:
        import peft

        model = peft.prepare_model_for_kbit_training(model)
    return model


def rows(plan: Plan, settings: Settings, vocabulary: int) -> Dataset:
    """Rows of full length for all steps; where padded, only the first of each batch is."""
    batch, length = plan.per_device_train_batch_size, plan.max_length or 1024
    batches = STEPS * plan.gradient_accumulation_steps
    lengths = batch_lengths(batch, length, padded=settings.padded) * batches
    if settings.packing:
        lengths = [length // 2] * (2 * len(lengths))
    ids = [torch.randint(3, vocabulary, (n,)).tolist() for n in lengths]
    columns = {"input_ids": ids}
    if settings.trainer == "trainer":
        columns |= {"labels": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return Dataset.from_dict(columns)


def arguments(plan: Plan, settings: Settings, output_dir: str) -> dict[str, Any]:
    """Training arguments, for both trainers."""
    checkpointing: dict[str, Any] = {}
    if settings.checkpoint_every_n_layers > 1:
        checkpointing["every_n_layers"] = settings.checkpoint_every_n_layers
    if plan.offload_activations:
        checkpointing["offload"] = True
    cuda = torch.cuda.is_available()
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "activation_checkpointing": plan.gradient_checkpointing,
        "activation_checkpointing_kwargs": checkpointing or None,
        "optim": plan.optim,
        "max_steps": STEPS,
        "bf16": cuda and settings.autocast == "bf16",
        "fp16": cuda and settings.autocast == "fp16",
        "use_cpu": not cuda,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def trainer_of(
    model: Any,
    plan: Plan,
    settings: Settings,
    tokenizer: Any,
    peaks: TrainerCallback,
    output_dir: str,
) -> Any:
    """The trainer that the plan and the settings describe."""
    values = arguments(plan, settings, output_dir)
    data = rows(plan, settings, len(tokenizer))
    lora = None
    if plan.lora_r is not None:
        names = list(plan.target_modules or ())
        lora = LoraConfig(
            r=plan.lora_r,
            lora_alpha=plan.lora_r,
            lora_dropout=settings.lora_dropout,
            use_dora=settings.use_dora,
            use_rslora=settings.use_rslora,
            target_modules="all-linear" if names == ["all-linear"] else names,
            task_type="CAUSAL_LM",
        )
    if settings.trainer == "sft":
        args = SFTConfig(**values, max_length=plan.max_length, packing=settings.packing)
        return SFTTrainer(
            model=model,
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[peaks],
        )
    if lora is not None:
        import peft

        model = peft.get_peft_model(model, lora)
        model.enable_input_require_grads()
    return Trainer(
        model=model,
        args=TrainingArguments(**values),
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[peaks],
    )
