"""The rungs that make a pass smaller, as pure decisions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomguard.errors import ConfigurationError
from oomguard.plan import Plan
from oomguard.rungs import CheckpointActivations, HalveSequence, SplitBatch
from tests.decisions import (
    BLIND,
    FLOORS,
    PLAN,
    PLANS,
    WIDTHS,
    largest_pass,
    packed_events,
    padded_events,
)

if TYPE_CHECKING:
    from oomguard.event import OOMEvent
    from oomguard.rung import Rung


def test_checkpointing_is_taken_once() -> None:
    rung = CheckpointActivations()
    after = rung(PLAN, BLIND)
    assert after == replace(PLAN, gradient_checkpointing=True)
    assert rung(after, BLIND) is None
    assert rung.spent(after, BLIND) == "gradient_checkpointing is already on"


@given(PLANS, padded_events() | packed_events(), FLOORS)
def test_sequences_are_halved_but_never_below_the_floor(
    plan: Plan, event: OOMEvent, floor: int
) -> None:
    after = HalveSequence(floor=floor)(plan, event)
    assert event.width is not None
    longest = min(event.width, plan.max_length or event.width)
    if after is None:
        assert longest <= floor
    else:
        assert after.max_length == max(floor, longest // 2)
        assert after.max_length < longest


@given(st.integers(2, 8192), FLOORS)
def test_halving_ends_on_the_floor(max_length: int, floor: int) -> None:
    rung, lengths = HalveSequence(floor=floor), [max_length]
    plan = replace(PLAN, max_length=max_length)
    for _ in range(14):
        after = rung(plan, largest_pass(plan, max_length))
        if after is None:
            break
        plan = after
        lengths.append(plan.max_length or 0)
    assert lengths == sorted(set(lengths), reverse=True)
    assert lengths[-1] == min(max_length, floor)


@given(PLANS, padded_events(), FLOORS, st.none() | WIDTHS)
def test_a_pass_of_windows_is_smaller_than_the_pass_that_failed(
    plan: Plan, event: OOMEvent, floor: int, limit: int | None
) -> None:
    after = HalveSequence(floor=floor)(replace(plan, max_pass_tokens=limit), event)
    if after is not None:
        assert after.max_pass_tokens is not None
        assert event.tokens is not None
        assert after.max_pass_tokens <= (limit or event.tokens - 1)


@pytest.mark.parametrize("floor", [2048, 4096])
def test_a_floor_that_is_not_below_the_rows_is_named_as_the_reason(floor: int) -> None:
    rung, event = HalveSequence(floor=floor), largest_pass(PLAN, 2048)
    assert rung(PLAN, event) is None
    assert rung.spent(PLAN, event) == f"rows of 2048 tokens are not above floor={floor}"


@pytest.mark.parametrize(("mode", "expected"), [(None, "windows"), ("truncate", "truncate")])
def test_the_mode_of_cutting_is_kept_unless_the_rung_names_one(
    mode: str | None, expected: str
) -> None:
    plan = replace(PLAN, sequence_mode="windows")
    after = HalveSequence(floor=256, mode=mode)(plan, BLIND)
    assert after is not None
    assert after.sequence_mode == expected


@pytest.mark.parametrize("floor", [1, 0, -512, True, 512.0, "512", None])
def test_a_floor_that_is_no_length_is_refused(floor: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"floor must be an int of 2 or more tokens"):
        HalveSequence(floor=floor)


@pytest.mark.parametrize("mode", ["window", "", "TRUNCATE", 1])
def test_an_unknown_mode_is_refused_with_the_known_ones(mode: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"use 'windows', 'truncate' or None"):
        HalveSequence(mode=mode)


@given(PLANS, padded_events(st.integers(2, 64)) | packed_events(st.integers(2, 64)))
def test_splitting_always_sets_a_limit_below_the_pass_that_failed(
    plan: Plan, event: OOMEvent
) -> None:
    after = SplitBatch()(plan, event)
    assert after is not None
    assert after.max_pass_tokens is not None
    assert event.tokens is not None
    assert 1 <= after.max_pass_tokens < event.tokens
    assert 1 <= (after.micro_batch_size or 0) <= plan.per_device_train_batch_size


@given(PLANS, padded_events(st.just(1)) | packed_events(st.just(1)))
def test_a_single_row_cannot_be_split(plan: Plan, event: OOMEvent) -> None:
    assert SplitBatch()(plan, event) is None
    assert "single row" in SplitBatch().spent(plan, event)


@given(st.integers(2, 64), WIDTHS)
def test_the_first_split_halves_the_loaded_batch(rows: int, width: int) -> None:
    plan = Plan(per_device_train_batch_size=rows)
    after = SplitBatch()(plan, largest_pass(plan, width))
    half = -(-rows // 2)
    assert after == replace(plan, micro_batch_size=half, max_pass_tokens=half * width)


@given(st.integers(1, 64), WIDTHS)
def test_splits_go_on_until_every_pass_is_one_row(rows: int, width: int) -> None:
    plan = Plan(per_device_train_batch_size=rows)
    seen = [rows]
    while (after := SplitBatch()(plan, largest_pass(plan, width))) is not None:
        plan = after
        seen.append(plan.micro_batch_size or 0)
    assert seen == sorted(set(seen), reverse=True)
    assert seen[-1] == 1


def test_before_any_batch_was_seen_max_length_stands_for_its_width() -> None:
    assert SplitBatch()(PLAN, BLIND) == replace(PLAN, micro_batch_size=4, max_pass_tokens=4 * 2048)
    shorter = replace(PLAN, max_length=1024, max_pass_tokens=8 * 1024)
    assert HalveSequence()(PLAN, BLIND) == shorter


@pytest.mark.parametrize("rung", [SplitBatch(), HalveSequence()])
def test_without_any_known_width_the_missing_setting_is_named(rung: Rung) -> None:
    plan = replace(PLAN, max_length=None)
    assert rung(plan, BLIND) is None
    assert "max_length is not set" in rung.spent(plan, BLIND)
