"""A plan as code to paste: the configurations of transformers, TRL, PEFT and bitsandbytes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

if TYPE_CHECKING:
    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings

_4BIT = ("nf4", "fp4")


class _Code(str):
    """An expression, printed as it is."""

    def __repr__(self) -> str:
        return str(self)


def snippet(plan: Plan, settings: Settings, lora_alpha: int | None = None) -> str:
    """Python code that makes the configurations of `plan`; it runs as it stands.

    Args:
        plan: What was found.
        settings: What it was found for.
        lora_alpha: Of the adapter that is there; twice the rank if `None`. It costs no memory.
    """
    parts = [_model(settings), _adapter(plan, settings, lora_alpha), _arguments(plan, settings)]
    body = "\n\n".join(part for part in parts if part)
    return "\n".join([*_imports(plan, settings), "", body, ""])


def _imports(plan: Plan, settings: Settings) -> list[str]:
    lines = []
    if settings.expandable_segments:
        lines += [
            "import os",
            "",
            'os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"',
            "",
        ]
    lines.append("import torch")
    if plan.lora_r is not None:
        lines.append("from peft import LoraConfig")
    names = ["BitsAndBytesConfig"] * settings.is_quantized
    names += ["TrainingArguments"] * (settings.trainer == "trainer")
    if names:
        lines.append(f"from transformers import {', '.join(names)}")
    if settings.trainer == "sft":
        lines.append("from trl import SFTConfig")
    return lines


def _model(settings: Settings) -> str:
    values: dict[str, Any] = {
        "dtype": _Code(f"torch.{settings.dtype}"),
        "attn_implementation": settings.attn_implementation,
    }
    quantization = ""
    if settings.quantization in _4BIT:
        quantization = _call(
            "quantization_config",
            "BitsAndBytesConfig",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": settings.quantization,
                "bnb_4bit_use_double_quant": settings.double_quant,
                "bnb_4bit_compute_dtype": values["dtype"],
            },
        )
    elif settings.is_quantized:
        quantization = _call("quantization_config", "BitsAndBytesConfig", {"load_in_8bit": True})
    if quantization:
        values["quantization_config"] = _Code("quantization_config")
    use = "# model = AutoModelForCausalLM.from_pretrained(name, **model_kwargs)"
    return "\n".join(filter(None, [quantization, _call("model_kwargs", "dict", values), use]))


def _adapter(plan: Plan, settings: Settings, lora_alpha: int | None) -> str:
    if plan.lora_r is None:
        return ""
    targets = list(plan.target_modules or ())
    values = {
        "r": plan.lora_r,
        "lora_alpha": lora_alpha or 2 * plan.lora_r,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "task_type": "CAUSAL_LM",
    }
    return _call("peft_config", "LoraConfig", values)


def _arguments(plan: Plan, settings: Settings) -> str:
    sft = settings.trainer == "sft"
    new = "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
    checkpointing = "activation_checkpointing" if new else "gradient_checkpointing"
    values: dict[str, Any] = {
        "output_dir": "output",
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        checkpointing: plan.gradient_checkpointing,
    }
    if plan.gradient_checkpointing:
        values[f"{checkpointing}_kwargs"] = _checkpointing(plan, settings)
    if plan.optim is not None:
        values["optim"] = plan.optim
    if settings.autocast == "fp16":
        values["fp16"] = True
    elif sft or settings.autocast == "bf16":
        # SFTConfig takes bf16 for granted, and refuses it where there is no GPU.
        bf16 = settings.autocast == "bf16"
        values["bf16"] = _Code("torch.cuda.is_available()") if bf16 else False
    if settings.max_grad_norm != 1.0:
        values["max_grad_norm"] = settings.max_grad_norm
    if sft and plan.max_length is not None:
        values["max_length"] = plan.max_length
    if sft and settings.packing:
        values["packing"] = True
    made = _call("args", "SFTConfig" if sft else "TrainingArguments", values)
    if sft or plan.max_length is None:
        return made
    return f"{made}\n# tokenizer(text, truncation=True, max_length={plan.max_length})"


def _checkpointing(plan: Plan, settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = {"use_reentrant": settings.use_reentrant}
    if settings.checkpoint_every_n_layers > 1:
        values["every_n_layers"] = settings.checkpoint_every_n_layers
    if plan.offload_activations:
        values["offload"] = True
    return values


def _call(name: str, function: str, values: dict[str, Any]) -> str:
    lines = [f"    {key}={_text(value)}," for key, value in values.items()]
    return "\n".join([f"{name} = {function}(", *lines, ")"])


def _text(value: Any) -> str:
    return repr(value).replace("'", '"')  # no name in here has quotes of its own
