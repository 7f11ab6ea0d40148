"""The plan: one frozen value whose effective batch no setting of memory touches."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomguard.errors import ConfigurationError
from oomguard.plan import Plan

COUNTS = st.integers(1, 10_000)
NAMES = st.text(min_size=1, max_size=12)
PLANS = st.builds(
    Plan,
    per_device_train_batch_size=COUNTS,
    gradient_accumulation_steps=COUNTS,
    world_size=COUNTS,
    micro_batch_size=st.none() | COUNTS,
    max_pass_tokens=st.none() | COUNTS,
    max_length=st.none() | COUNTS,
    sequence_mode=st.sampled_from([None, "windows", "truncate"]),
    gradient_checkpointing=st.booleans(),
    optim=st.none() | NAMES,
    target_modules=st.none() | st.lists(NAMES).map(tuple),
    lora_r=st.none() | COUNTS,
)
COUNTED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "micro_batch_size",
    "max_pass_tokens",
    "max_length",
)


@given(PLANS)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(PLANS)
def test_to_dict_names_every_setting(plan: Plan) -> None:
    assert list(plan.to_dict()) == [field.name for field in fields(Plan)]


@given(PLANS)
def test_plans_can_be_compared_and_hashed(plan: Plan) -> None:
    assert len({plan, replace(plan)}) == 1


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("value", [0, -1, -(10**9), True, False])
def test_a_count_below_one_is_refused_by_name_and_value(name: str, value: int) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, name: value}
    with pytest.raises(ConfigurationError, match=rf"Plan\.{name} is {value}; .* 1 or more"):
        Plan(**settings)


@pytest.mark.parametrize("name", COUNTED)
def test_one_is_a_count(name: str) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 1, name: 1}
    assert getattr(Plan(**settings), name) == 1


def test_a_refusal_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="max_length is 0"):
        Plan(per_device_train_batch_size=8, max_length=0)


def test_a_plan_cannot_be_changed_in_place() -> None:
    plan = Plan(per_device_train_batch_size=8)
    with pytest.raises(FrozenInstanceError):
        plan.max_length = 512  # type: ignore[misc]  # what the test is about


@given(PLANS)
def test_the_effective_batch_is_rows_times_accumulation_times_processes(plan: Plan) -> None:
    rows, steps = plan.per_device_train_batch_size, plan.gradient_accumulation_steps
    assert plan.effective_batch_size == rows * steps * plan.world_size


@given(PLANS, PLANS)
def test_the_effective_batch_ignores_settings_of_memory(plan: Plan, other: Plan) -> None:
    changed = replace(
        plan,
        micro_batch_size=other.micro_batch_size,
        max_pass_tokens=other.max_pass_tokens,
        max_length=other.max_length,
        gradient_checkpointing=other.gradient_checkpointing,
        optim=other.optim,
        target_modules=other.target_modules,
        lora_r=other.lora_r,
    )
    assert changed.effective_batch_size == plan.effective_batch_size


@given(PLANS)
def test_the_passes_of_a_step_hold_all_of_its_rows_and_none_is_idle(plan: Plan) -> None:
    rows = plan.micro_batch_size or plan.per_device_train_batch_size
    passes, left_over = divmod(plan.passes_per_step, plan.gradient_accumulation_steps)
    assert left_over == 0
    assert (passes - 1) * rows < plan.per_device_train_batch_size <= passes * rows


@given(PLANS)
def test_a_plan_does_not_differ_from_itself(plan: Plan) -> None:
    assert plan.changes(plan) == {}
    assert plan.describe_change(plan) == f"effective batch {plan.effective_batch_size} unchanged"


@given(PLANS, PLANS)
def test_changes_turn_one_plan_into_the_other(before: Plan, after: Plan) -> None:
    changes = before.changes(after)
    settings = before.to_dict() | {name: there for name, (_, there) in changes.items()}
    assert Plan.from_dict(settings) == after
    assert all(here != there for here, there in changes.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"micro_batch_size": 4, "max_pass_tokens": 8192}, "8 x 4 -> 4 x 8 passes"),
        ({"micro_batch_size": 3}, "8 x 4 -> 3 x 12 passes"),
        ({"max_pass_tokens": 8192}, "max_pass_tokens unlimited -> 8192"),
        ({"max_length": 1024, "max_pass_tokens": 8192}, "max_length 2048 -> 1024"),
        ({"max_length": 1024, "sequence_mode": "windows"}, "max_length 2048 -> 1024"),
        ({"max_length": None}, "max_length 2048 -> unlimited"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing off -> on"),
        ({"optim": "paged_adamw_8bit"}, "optim adamw_torch -> paged_adamw_8bit"),
        (
            {"micro_batch_size": 4, "max_length": 1024, "max_pass_tokens": 4096},
            "8 x 4 -> 4 x 8 passes, max_length 2048 -> 1024",
        ),
    ],
)
def test_a_change_is_told_in_the_words_of_the_settings(
    change: dict[str, object], words: str
) -> None:
    before = Plan(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_length=2048,
        optim="adamw_torch",
    )
    after = Plan.from_dict(before.to_dict() | change)
    assert before.describe_change(after) == f"{words}, effective batch 32 unchanged"
