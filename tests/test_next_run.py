"""The code that a report offers for the next run is code, and says what the plan says."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig

from oomguard.plan import Plan
from oomguard.report.next_run import snippet

if TYPE_CHECKING:
    from pathlib import Path

PLAN = Plan(per_device_train_batch_size=8, gradient_accumulation_steps=2, max_length=256)
HOSTILE = 'q_proj"]\n); import os; os.exit(1)  # </script><script>alert(1)</script>'


def executed(code: str, folder: Path) -> dict[str, Any]:
    """The names that the code makes, on a machine without a GPU."""
    names: dict[str, Any] = {}
    for config in ("SFTConfig", "TrainingArguments"):
        code = code.replace(
            f"{config}(\n", f"{config}({str(folder)!r}, bf16=False, use_cpu=True,\n"
        )
    exec(compile(code, "snippet", "exec"), names)  # noqa: S102 - that it runs is the question
    return names


def test_the_code_of_a_plan_runs_and_configures_it(tmp_path: Path) -> None:
    plan = replace(
        PLAN,
        micro_batch_size=2,
        gradient_checkpointing=True,
        optim="paged_adamw_8bit",
        target_modules=("q_proj", "v_proj"),
        lora_r=4,
    )
    made = executed(snippet(plan), tmp_path)
    args, lora = made["args"], made["peft_config"]
    assert type(args) is SFTConfig
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 8)
    assert (args.max_length, args.gradient_checkpointing) == (256, True)
    assert args.optim == "paged_adamw_8bit"
    assert type(lora) is LoraConfig
    assert lora.r == 4
    assert sorted(lora.target_modules or ()) == ["q_proj", "v_proj"]


def test_checkpointing_that_was_off_stays_off_although_trl_switches_it_on(tmp_path: Path) -> None:
    assert executed(snippet(PLAN), tmp_path)["args"].gradient_checkpointing is False


def test_a_plan_without_a_limit_on_rows_or_lora_is_that_of_a_plain_trainer(tmp_path: Path) -> None:
    made = executed(snippet(replace(PLAN, max_length=None)), tmp_path)
    assert type(made["args"]) is TrainingArguments
    assert "peft_config" not in made


def test_checkpoints_on_the_host_are_asked_for(tmp_path: Path) -> None:
    plan = replace(PLAN, gradient_checkpointing=True, offload_activations=True)
    assert executed(snippet(plan), tmp_path)["args"].gradient_checkpointing_kwargs["offload"]


def test_what_a_config_cannot_say_stands_in_a_comment(tmp_path: Path) -> None:
    start = replace(PLAN, target_modules=("q_proj",), lora_r=8)
    code = snippet(replace(start, max_length=128, lora_r=4), start)
    assert "max_length=128,  # longer rows are cut off here" in code
    assert "r=4,  # was 8; let lora_alpha fall with it" in code
    assert executed(code, tmp_path)["args"].max_length == 128
    assert " # was" not in snippet(start, start)


def test_a_name_of_a_module_is_text_and_never_code(tmp_path: Path) -> None:
    made = executed(snippet(replace(PLAN, target_modules=(HOSTILE,), lora_r=2)), tmp_path)
    assert made["peft_config"].target_modules == {HOSTILE}


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8")))
def test_any_name_comes_out_as_it_went_in(name: str) -> None:
    code = snippet(replace(PLAN, optim=name))
    # "exec" reads source as Python's own tokenizer does, line ends of all kinds included.
    names: dict[str, Any] = {"SFTConfig": dict}
    exec(code.partition("\n")[2], names)  # noqa: S102 - our own text
    assert names["args"]["optim"] == name


@settings(max_examples=50)
@given(st.integers(1, 64), st.integers(1, 8), st.none() | st.integers(1, 64))
def test_the_effective_batch_is_kept_and_no_pass_has_more_rows(
    batch: int, accumulation: int, rows: int | None
) -> None:
    plan = Plan(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        micro_batch_size=rows,
    )
    code = snippet(plan).partition("(")[2].rpartition(")")[0]
    made: dict[str, Any] = eval(f"dict({code})")  # noqa: S307 - our own text
    size, passes = made["per_device_train_batch_size"], made["gradient_accumulation_steps"]
    assert size * passes == plan.effective_batch_size
    assert size <= (rows or batch)
