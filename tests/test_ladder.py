"""Rungs and ladders: pure decisions that end, and that never touch the effective batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomguard.errors import ConfigurationError
from oomguard.event import OOMEvent
from oomguard.ladder import Ladder
from oomguard.plan import Plan
from oomguard.rung import Fidelity, Rung, rung_fidelity, rung_name, rung_spent
from oomguard.rungs import CheckpointActivations, HalveSequence, SplitBatch

COUNTS = st.integers(1, 64)
WIDTHS = st.integers(1, 8192)
PHASES = st.sampled_from(["fetch", "forward", "backward", "clip", "optimizer", "bookkeeping"])
FLOORS = st.integers(2, 8192)
PLANS = st.builds(
    Plan,
    per_device_train_batch_size=COUNTS,
    gradient_accumulation_steps=COUNTS,
    world_size=COUNTS,
    max_length=st.none() | WIDTHS,
    gradient_checkpointing=st.booleans(),
)
PLAN = Plan(per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=2048)
BLIND = OOMEvent(phase="fetch", step=1)


@st.composite
def padded_events(draw: st.DrawFn, rows: st.SearchStrategy[int] = COUNTS) -> OOMEvent:
    """A pass of padded rows: tokens = rows x width."""
    count, width = draw(rows), draw(WIDTHS)
    return OOMEvent(phase=draw(PHASES), step=1, rows=count, width=width, tokens=count * width)


@st.composite
def packed_events(draw: st.DrawFn, documents: st.SearchStrategy[int] = COUNTS) -> OOMEvent:
    """A pass of documents laid end to end: the longest is the width, and none is empty."""
    count, width = draw(documents), draw(WIDTHS)
    tokens = draw(st.integers(width + count - 1, count * width))
    return OOMEvent(phase=draw(PHASES), step=1, rows=count, width=width, tokens=tokens)


EVENTS = st.one_of(padded_events(), packed_events(), st.builds(OOMEvent, phase=PHASES, step=COUNTS))
RUNGS = st.lists(
    st.one_of(
        st.just(CheckpointActivations()), st.builds(HalveSequence, FLOORS), st.just(SplitBatch())
    ),
    min_size=1,
    unique_by=type,
)


def next_plan(ladder: Ladder, plan: Plan, event: OOMEvent) -> Plan | None:
    answers = (rung(plan, event) for rung in ladder)
    return next((answer for answer in answers if answer is not None), None)


def largest_pass(plan: Plan, width: int) -> OOMEvent:
    """The failure of the largest pass that `plan` allows on rows of `width` tokens."""
    width = min(width, plan.max_length or width)
    rows = plan.micro_batch_size or plan.per_device_train_batch_size
    if plan.max_pass_tokens is not None:
        rows = max(1, min(rows, plan.max_pass_tokens // width))
    return OOMEvent(phase="backward", step=1, rows=rows, width=width, tokens=rows * width)


@given(PLANS, RUNGS, st.lists(EVENTS, max_size=20))
def test_no_sequence_of_failures_changes_the_effective_batch(
    plan: Plan, rungs: list[Rung], events: list[OOMEvent]
) -> None:
    ladder, now = Ladder(*rungs), plan
    for event in events:
        now = next_plan(ladder, now, event) or now
    assert now.effective_batch_size == plan.effective_batch_size
    assert now.per_device_train_batch_size == plan.per_device_train_batch_size
    assert now.gradient_accumulation_steps == plan.gradient_accumulation_steps


@given(PLANS, RUNGS, WIDTHS)
def test_a_run_that_always_fails_reaches_the_end_of_its_ladder(
    plan: Plan, rungs: list[Rung], width: int
) -> None:
    ladder, now = Ladder(*rungs), plan
    # Six halvings of 64 rows, thirteen of 8192 tokens, checkpointing.
    for _ in range(6 + 13 + 1):
        event = largest_pass(now, width)
        after = next_plan(ladder, now, event)
        if after is None:
            break
        assert after != now
        now = after
    assert all(rung(now, largest_pass(now, width)) is None for rung in ladder)


@given(PLANS, RUNGS, EVENTS)
def test_a_rung_that_answers_changes_something_and_otherwise_says_why_not(
    plan: Plan, rungs: list[Rung], event: OOMEvent
) -> None:
    for rung in rungs:
        answer = rung(plan, event)
        if answer is None:
            assert rung_spent(rung, plan, event)
        else:
            assert plan.changes(answer)


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


def test_an_empty_ladder_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="needs at least one rung"):
        Ladder()


def test_two_rungs_of_a_kind_are_refused_by_name_and_number() -> None:
    with pytest.raises(ConfigurationError, match="holds HalveSequence 2 times"):
        Ladder(HalveSequence(floor=512), SplitBatch(), HalveSequence(floor=128))


@pytest.mark.parametrize("rung", [SplitBatch, "SplitBatch", None, [SplitBatch()]])
def test_what_is_no_rung_is_refused_with_what_to_write(rung: Any) -> None:
    hint = r"SplitBatch\(\)" if rung is SplitBatch else "a Rung or a function"
    with pytest.raises(ConfigurationError, match=f"give it {hint}"):
        Ladder(rung)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="'exact'; use 'default', 'exact_first' or"):
        Ladder.of("exact")


LATER = ["PageOptimizer8bit", "NarrowTargets", "LowerRank"]


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("default", ["CheckpointActivations", "HalveSequence", "SplitBatch", *LATER]),
        (
            "exact_first",
            [
                "CheckpointActivations",
                "SplitBatch",
                "PageOptimizer8bit",
                "HalveSequence",
                "NarrowTargets",
                "LowerRank",
            ],
        ),
    ],
)
def test_a_preset_has_its_documented_order(preset: str, names: list[str]) -> None:
    assert [rung_name(rung) for rung in Ladder.of(preset)] == names


def test_a_ladder_shows_its_rungs_with_their_settings() -> None:
    ladder = Ladder(CheckpointActivations(), HalveSequence(floor=512))
    assert len(ladder) == 2
    assert repr(ladder) == "Ladder(CheckpointActivations(), HalveSequence(floor=512, mode=None))"


def test_a_plain_function_is_a_rung_that_counts_as_semantic() -> None:
    def drop_adapters(plan: Plan, event: OOMEvent) -> Plan | None:
        return None if plan.lora_r == 4 else replace(plan, lora_r=4)

    ladder = Ladder(SplitBatch(), drop_adapters)
    assert rung_name(drop_adapters) == "drop_adapters"
    assert rung_fidelity(drop_adapters) is Fidelity.SEMANTIC
    after = next_plan(ladder, replace(PLAN, micro_batch_size=1), BLIND)
    assert after is not None
    assert after.lora_r == 4
    assert next_plan(ladder, after, BLIND) is None
    assert rung_spent(drop_adapters, after, BLIND) == "it answered None"
