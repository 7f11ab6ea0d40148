"""Peaks of real training runs on a CUDA GPU, for `benchmarks/prediction.py` to compare with.

    python -m gpu_checks.truth --out truth.json

Every run has a fresh model with random weights, loaded from a folder as a user's is, and two
optimizer steps: a model that was trained before would train without autocast, since accelerate
prepares a model once. Each shape runs in a process of its own. A row holds the configuration, the
plan and the settings as `oomguard.estimate` takes them, and what the allocator counted in each
step; rows are written as they are made. `--tiny` runs the same on the CPU with small shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from oomguard.plan import Plan
from oomguard.prediction.settings import Settings
from oomguard.report import installed_versions

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_LORA: dict[str, Any] = {"lora_r": 16, "target_modules": _QKVO}
_EAGER = {"attn_implementation": "eager"}  # Gemma 2 has nothing else
_ALL: dict[str, Any] = {"lora_r": 16, "target_modules": ("all-linear",)}
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": None},
    "gpt2": {"model_type": "gpt2", "n_positions": 2048, "use_cache": False},
    "gemma2": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 13,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
# Plan and settings of each run; what is not said is the default of `Plan` and `Settings`.
RUNS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {**_LORA, "max_length": 1024, "batch": 2},
        {**_LORA, "max_length": 1024, "batch": 2, "gradient_checkpointing": False},
        {**_LORA, "use_dora": True, "quantization": "nf4", "max_length": 1024},
        {**_LORA, "use_dora": True, "max_length": 1024, "gradient_checkpointing": False},
        {**_ALL, "lora_dropout": 0.1, "max_length": 1024, "gradient_checkpointing": False},
        {**_ALL, "quantization": "int8", "max_length": 1024},
        {**_ALL, "quantization": "int8", "max_length": 1024, "gradient_checkpointing": False},
        {**_ALL, "quantization": "fp4", "double_quant": False, "max_length": 1024},
        {**_ALL, "quantization": "nf4", "max_length": 1000, "batch": 3},
        {**_LORA, "attn_implementation": "eager", "max_length": 1024},
        {
            **_LORA,
            "attn_implementation": "eager",
            "max_length": 512,
            "gradient_checkpointing": False,
        },
        {**_LORA, "trainer": "trainer", "max_length": 1024, "batch": 2},
        {**_LORA, "trainer": "trainer", "mixed_precision": "bf16", "max_length": 1024},
        {**_LORA, "accumulation": 2, "max_length": 1024, "gradient_checkpointing": False},
        {**_LORA, "packing": True, "max_length": 1024, "batch": 2},
        {**_LORA, "padded": True, "max_length": 1024, "batch": 4},
        {**_LORA, "padded": True, "max_length": 1000, "batch": 4, "gradient_checkpointing": False},
        {**_LORA, "offload_activations": True, "max_length": 4096},
        {**_LORA, "checkpoint_every_n_layers": 2, "max_length": 2048},
        {**_LORA, "quantization": "nf4", "prepare_for_kbit": True, "max_length": 1024},
        {**_LORA, "dtype": "float16", "max_length": 1024, "gradient_checkpointing": False},
        {**_LORA, "dtype": "float32", "max_length": 1024, "gradient_checkpointing": False},
        {**_LORA, "dtype": "float32", "mixed_precision": "no", "max_length": 1024},
        {**_LORA, "quantization": "nf4", "max_length": 1024, "optim": "paged_adamw_32bit"},
    ],
    "mistral": [
        {"optim": name, "max_length": 512}
        for name in ("adafactor", "sgd", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused")
    ]
    + [
        {"accumulation": 2, "max_length": 512},
        {"dtype": "float32", "max_length": 1024, "gradient_checkpointing": False},
        {"trainer": "trainer", "max_length": 1024, "gradient_checkpointing": False},
        # Last: bitsandbytes keeps the embedding of an 8-bit run alive (GlobalOptimManager).
        {"optim": "adamw_8bit", "max_length": 512},
    ],
    "gpt2": [
        {"max_length": 1024, "batch": 4},
        {"max_length": 1024, "batch": 4, "gradient_checkpointing": False},
        {"max_length": 512, "dtype": "float32", "gradient_checkpointing": False},
        {**_LORA, "target_modules": ("c_attn",), "max_length": 1024, "quantization": "nf4"},
    ],
    "gemma2": [
        {**_LORA, **_EAGER, "max_length": 1024},
        {**_LORA, **_EAGER, "max_length": 2048, "gradient_checkpointing": False},
        {**_LORA, **_EAGER, "max_length": 1024, "quantization": "nf4", "padded": True, "batch": 2},
    ],
    "gemma3": [
        {**_LORA, "max_length": 1024, "batch": 2},
        {**_LORA, "max_length": 1024, "gradient_checkpointing": False},
    ],
    "qwen3": [
        {**_ALL, "max_length": 1024, "batch": 2},
        {**_ALL, "max_length": 1024, "batch": 2, "gradient_checkpointing": False},
        {"max_length": 1024},
        {**_ALL, "quantization": "nf4", "max_length": 128, "batch": 2},
    ],
    "mixtral": [
        {**_LORA, "max_length": 1024},
        {**_LORA, "max_length": 1024, "gradient_checkpointing": False},
        {**_LORA, "max_length": 1024, "quantization": "nf4"},
    ],
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
}
_OPTIMIZERS_OF_CARDS = ("paged", "8bit")


def request(run: dict[str, Any]) -> tuple[Plan, Settings]:
    """The plan and the settings of a run of `RUNS`."""
    values: dict[str, Any] = {"gradient_checkpointing": True, "optim": "adamw_torch_fused", **run}
    values["per_device_train_batch_size"] = values.pop("batch", 1)
    values["gradient_accumulation_steps"] = values.pop("accumulation", 1)
    kept = {name: value for name, value in values.items() if name in Settings.names()}
    plan = Plan(**{name: value for name, value in values.items() if name not in kept})
    return plan, Settings(**kept)


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
        row: dict[str, Any] = {"sec": time.perf_counter() - self._began}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            row["peak_alloc"] = stats["allocated_bytes.all.peak"]
            row["peak_reserved"] = stats["reserved_bytes.all.peak"]
            row["peak_requested"] = stats["requested_bytes.all.peak"]
            row["end_alloc"] = stats["allocated_bytes.all.current"]
            row["retries"] = stats["num_alloc_retries"]
        self.rows.append(row)


def save(config: Any, folder: Path) -> None:
    """A model with random weights, as a user would have downloaded it."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


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
    """Two steps of rows as long as the plan allows; where padded, the first of each batch alone."""
    batch, length = plan.per_device_train_batch_size, plan.max_length or 1024
    count = 2 * batch * plan.gradient_accumulation_steps
    short = length // 2
    lengths = [short if settings.padded and i % batch else length for i in range(count)]
    if settings.packing:
        lengths = [short] * (2 * count)
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
        "max_steps": 2,
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


def measure(folder: Path, config: Any, run: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """One row."""
    plan, settings = request(run)
    row: dict[str, Any] = {"plan": plan.to_dict(), "settings": asdict(settings)}
    peaks = Peaks()
    try:
        model = loaded(folder, settings)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as output:
            trainer = trainer_of(model, plan, settings, tokenizer, peaks, output)
            del model
            if torch.cuda.is_available():
                row["start_alloc"] = torch.cuda.memory_allocated()
            trainer.train()
        row["steps"] = peaks.rows
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            row["device_used"], row["reserved_now"] = total - free, torch.cuda.memory_reserved()
    except torch.OutOfMemoryError as error:
        row["oom"] = str(error)[:200]
    except Exception as error:  # noqa: BLE001 - a run that fails is a row too
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def tokenizer_of(config: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of one word a token, and its special tokens in `config`."""
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 1, 2, None
    words = {f"t{i}": i for i in range(config.vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")),
        pad_token="t1",
        eos_token="t2",
    )


def child(shape: str, out: Path, tiny: bool) -> None:
    """All runs of one shape, appended to `out`."""
    values = dict(SHAPES[shape])
    if tiny:
        values |= {name: value for name, value in _TINY.items() if name in values or "n_" in name}
    config = CONFIG_MAPPING[values["model_type"]](
        **{name: value for name, value in values.items() if name != "model_type"}
    )
    tokenizer = tokenizer_of(config)
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        save(config, Path(folder))
        for run in RUNS[shape]:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            chosen = {**run, "max_length": 32} if tiny else run
            if tiny and any(word in chosen.get("optim", "") for word in _OPTIMIZERS_OF_CARDS):
                chosen = {**chosen, "optim": "adamw_torch"}
            row = measure(Path(folder), config, chosen, tokenizer)
            append(out, {"model": shape, "config": values, **row})


def append(out: Path, row: dict[str, Any]) -> None:
    """Write one more row."""
    found = json.loads(out.read_text())
    found["rows"].append(row)
    out.write_text(json.dumps(found))
    said = row.get("error") or row.get("oom") or row["steps"][-1]
    sys.stderr.write(f"{row['model']} {row['plan']['optim']} {said}\n")


def heading() -> dict[str, Any]:
    """The device and the versions."""
    found: dict[str, Any] = {
        "device": "cpu",
        "versions": installed_versions(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        found["device"] = torch.cuda.get_device_name()
        found["context_bytes"] = total - free - torch.cuda.memory_reserved()
        found["total"] = total
    return found


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU")
    parser.add_argument("--shape", choices=SHAPES, help="one shape alone, in this process")
    chosen = parser.parse_args()
    if chosen.shape is not None:
        child(chosen.shape, chosen.out, chosen.tiny)
        return
    chosen.out.write_text(json.dumps(heading()))
    del chosen.shape
    for shape in SHAPES:
        command = [sys.executable, "-m", "gpu_checks.truth", "--out", str(chosen.out)]
        command += ["--shape", shape, *(["--tiny"] if chosen.tiny else [])]
        subprocess.run(command, check=False, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})  # noqa: S603 - our own module


if __name__ == "__main__":
    main()
