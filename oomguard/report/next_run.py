"""A plan as the code that configures the next run."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oomguard.plan import Plan

_AS_BEFORE = "# and what else your script sets"


def snippet(plan: Plan, start: Plan | None = None) -> str:
    """Python code whose `args`, and `peft_config` with LoRA, have the settings of a plan.

    Limits of a pass become a smaller batch with more accumulation; the effective batch is kept.

    Args:
        plan: What is configured.
        start: What the run started with, if the plan is where a ladder has led.

    Returns:
        Code for the installed versions of transformers, TRL and PEFT.
    """
    arguments = _arguments(plan)
    # Without a limit on rows the plan may be that of a plain Trainer.
    config = "TrainingArguments" if plan.max_length is None else "SFTConfig"
    package = "transformers" if plan.max_length is None else "trl"
    notes = {}
    if start is not None and start.max_length != plan.max_length:
        notes["max_length"] = "longer rows are cut off here, where oomguard may have cut windows"
    imports, calls = [f"from {package} import {config}"], [_call("args", config, arguments, notes)]
    if plan.target_modules is not None and plan.lora_r is not None:
        lora = {"r": plan.lora_r, "target_modules": list(plan.target_modules)}
        note = {}
        if start is not None and start.lora_r != plan.lora_r:
            note["r"] = f"was {start.lora_r}; let lora_alpha fall with it"
        imports.insert(0, "from peft import LoraConfig")
        calls.append(_call("peft_config", "LoraConfig", lora, note))
    return "\n\n".join(["\n".join(imports), *calls]) + "\n"


def _arguments(plan: Plan) -> dict[str, Any]:
    rows = _rows_of_a_pass(plan)
    passes = plan.gradient_accumulation_steps * plan.per_device_train_batch_size // rows
    checkpointing = _checkpointing_name()
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": passes,
    }
    if plan.max_length is not None:
        arguments["max_length"] = plan.max_length
    arguments[checkpointing] = plan.gradient_checkpointing
    if plan.offload_activations:
        arguments[f"{checkpointing}_kwargs"] = {"offload": True}
    if plan.optim is not None:
        arguments["optim"] = plan.optim
    return arguments


def _rows_of_a_pass(plan: Plan) -> int:
    """The most rows that fit and divide the batch, so that all passes are of equal size."""
    batch = plan.per_device_train_batch_size
    most = min(plan.micro_batch_size or batch, batch)
    return next(rows for rows in range(most, 0, -1) if batch % rows == 0)


def _checkpointing_name() -> str:
    # Slow to import; which of the names there is depends on the installed version.
    from transformers import TrainingArguments

    new = "activation_checkpointing"
    known = {field.name for field in fields(TrainingArguments)}
    return new if new in known else "gradient_checkpointing"


def _call(name: str, function: str, arguments: dict[str, Any], notes: dict[str, str]) -> str:
    lines = [
        f"    {argument}={_literal(value)},"
        + (f"  # {notes[argument]}" if argument in notes else "")
        for argument, value in arguments.items()
    ]
    return "\n".join([f"{name} = {function}(", *lines, f"    {_AS_BEFORE}", ")"])


def _literal(value: Any) -> str:
    """A value as Python spells it, text in double quotes, as formatters want it."""
    if isinstance(value, (str, list)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
