"""The pure search: on a synthetic card whose bytes grow with everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomguard.errors import ConfigurationError
from oomguard.largest_plan import best, fewer_rows, largest
from oomguard.plan import Plan
from oomguard.search_space import FREE, MAXIMIZE, space

START = Plan(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=12,
    max_length=1024,
    optim="adamw_torch_fused",
    target_modules=("down_proj", "q_proj", "v_proj"),
    lora_r=16,
)


def bytes_of(plan: Plan) -> int:
    """A model of a billion bytes; activations by the token, adapters by the rank."""
    tokens = plan.per_device_train_batch_size * (plan.max_length or 0)
    activations = tokens * (40_000 if plan.gradient_checkpointing else 700_000)
    adapters = (plan.lora_r or 0) * len(plan.target_modules or ()) * 1_000_000
    return 10**9 + activations + adapters * (2 if plan.optim == "paged_adamw_8bit" else 4)


def fits(limit_bytes: int) -> Any:
    return lambda plan: bytes_of(plan) <= limit_bytes


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=200, unique=True).map(sorted),
    st.integers(0, 10**6),
    st.integers(0, 250),
    st.sampled_from([None, 64]),
)
def test_the_largest_value_is_found_in_a_few_questions(
    values: list[int], limit: int, first: int, parts: int | None
) -> None:
    asked = []

    def question(value: int) -> bool:
        asked.append(value)
        return value <= limit

    low = -1 if values[0] > limit else 0
    found = largest(values, question, low, first, parts)
    true = max((index for index, value in enumerate(values) if value <= limit), default=-1)
    if true < 0 or parts is None:
        assert found == true
    else:
        assert values[true] * (1 - 1 / parts) <= values[found] <= values[true]
    assert len(asked) == len(set(asked)) <= 2 * len(values).bit_length() + 1


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(MAXIMIZE),
    st.sets(st.sampled_from(FREE)),
    st.integers(10**9, 4 * 10**10),
    st.booleans(),
    st.sampled_from([None, 700, 5000]),
)
def test_what_is_found_fits_and_keeps_the_effective_batch(
    maximize: str, free: set[str], limit: int, keeps_batch: bool, longest: int | None
) -> None:
    start = replace(START, max_length=min(1024, longest or 1024))
    searched = space(
        start, maximize, sorted(free), keeps_batch=keeps_batch, longest=longest, largest_rank=256
    )
    for plan in (plans := best(searched, fits(limit))):
        assert bytes_of(plan) <= limit
        assert plan.effective_batch_size == 24 or not keeps_batch
        assert longest is None or (plan.max_length or 0) <= longest
        changed = set(start.changes(plan)) - {"per_device_train_batch_size", "micro_batch_size"}
        axes = {axis.name for axis in searched.axes}
        assert changed <= {*free, *axes, "gradient_accumulation_steps"}
    assert plans == sorted(plans, key=lambda plan: -searched.size(plan))
    if not plans:
        assert not fits(limit)(searched.smallest)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(MAXIMIZE), st.sets(st.sampled_from(FREE)), st.integers(10**9, 10**10))
def test_a_larger_card_never_gets_a_smaller_plan(maximize: str, free: set[str], limit: int) -> None:
    searched = space(START, maximize, sorted(free), keeps_batch=True, largest_rank=256)
    small, large = (best(searched, fits(size)) for size in (limit, 2 * limit))
    if small:
        assert searched.size(large[0]) >= searched.size(small[0]) * 63 / 64


@pytest.mark.parametrize("gib", [8, 12, 16, 24])
def test_the_most_tokens_of_a_card_take_nearly_all_of_it(gib: int) -> None:
    searched = space(START, "tokens", keeps_batch=False)
    (plan,) = best(searched, fits(gib * 2**30))
    assert 0.97 * gib * 2**30 < bytes_of(plan) <= gib * 2**30
    assert (plan.max_length or 0) >= 1024, "rows come first: no row is cut for more of them"


def test_a_number_that_is_free_gives_way_only_as_far_as_needed() -> None:
    limit = bytes_of(replace(START, per_device_train_batch_size=1, max_length=640))
    tight = space(START, "micro_batch_size", ("max_length",), keeps_batch=True)
    (plan,) = best(tight, fits(limit))
    assert plan.per_device_train_batch_size == 1
    assert plan.max_length in range(630, 641)
    (roomy,) = best(tight, fits(10 * limit))
    assert roomy.max_length == 1024
    assert best(space(START, "micro_batch_size", keeps_batch=True), fits(limit)) == []


def test_of_equal_plans_the_one_that_changes_less_comes_first() -> None:
    searched = space(
        START, "micro_batch_size", ("gradient_checkpointing", "optim"), keeps_batch=True
    )
    plans = best(searched, fits(10**12))
    assert [plan.per_device_train_batch_size for plan in plans] == [24] * 4
    assert START.changes(plans[0]).keys() == {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "micro_batch_size",
    }
    tight = best(searched, fits(2 * 10**9))
    assert tight[0].gradient_checkpointing


def test_rows_are_halved_down_to_one() -> None:
    searched = space(START, "throughput", keeps_batch=True)
    plan: Plan | None = searched.at(START, "micro_batch_size", 24)
    rows = []
    while plan is not None:
        rows.append(plan.per_device_train_batch_size)
        plan = fewer_rows(searched, plan)
    assert rows == [24, 12, 6, 3, 1]


@pytest.mark.parametrize(
    ("maximize", "free", "said"),
    [
        ("speed", (), "give one of tokens"),
        ("tokens", "optim", "give a tuple of names, such as ('optim',)"),
        ("tokens", ("learning_rate",), "free names 'learning_rate'"),
    ],
)
def test_what_cannot_be_searched_is_refused(maximize: str, free: Any, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        space(START, maximize, free, keeps_batch=True)
    assert said in str(refused.value)


def test_a_full_fine_tune_has_no_rank_to_search() -> None:
    full = replace(START, lora_r=None, target_modules=None)
    with pytest.raises(ConfigurationError, match="train LoRA adapters"):
        space(full, "lora_r", keeps_batch=True)
