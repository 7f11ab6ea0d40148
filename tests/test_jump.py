"""Which rung is jumped to, by what each is estimated to need."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomguard import jump
from oomguard.event import OOMEvent
from oomguard.jump import Candidate, choose
from oomguard.plan import Plan
from oomguard.rung import rung_name
from oomguard.rungs import CheckpointActivations, HalveSequence, PageOptimizer8bit, SplitBatch

if TYPE_CHECKING:
    from oomguard.rung import RungLike

PLAN = Plan(per_device_train_batch_size=8, max_length=1024, optim="adamw_torch")
EVENT = OOMEvent(phase="backward", step=1, rows=8, width=1024, tokens=8192)
ROOM = 100
RUNGS: tuple[RungLike, ...] = (CheckpointActivations(), SplitBatch(), HalveSequence())


def candidates(*rungs: RungLike) -> list[Candidate]:
    found = [(rung, rung(PLAN, EVENT), place) for place, rung in enumerate(rungs)]
    return [Candidate(rung, plan, place) for rung, plan, place in found if plan is not None]


def deeper(first: Candidate) -> list[Candidate]:
    """The rung taken three more times."""
    found, event = [first], EVENT
    for _ in range(3):
        event = jump.failing_again(event, found[-1].plan)
        plan = found[-1].rung(found[-1].plan, event)
        if plan is None:
            break
        found.append(found[-1]._replace(plan=plan))
    return found[1:]


def jumped(needs: dict[str, Any], *rungs: RungLike) -> tuple[str, list[str], Plan]:
    """The rung chosen, those passed over, and the plan; what is not in `needs` is not known."""
    first, *later = candidates(*(rungs or RUNGS))

    def needed(plan: Plan) -> int | None:
        rows = plan.micro_batch_size or 8
        checkpointed = "checkpointed" if plan.gradient_checkpointing else ""
        return needs.get(checkpointed or (f"{rows} rows" if plan.max_length == 1024 else "short"))

    chosen, passed = choose(first, iter(later), deeper(first), needed, ROOM)
    assert all(one.usable_bytes == ROOM for one in passed)
    return rung_name(chosen.rung), [one.rung for one in passed], chosen.plan


@pytest.mark.parametrize(
    ("needs", "chosen", "passed"),
    [
        ({}, "CheckpointActivations", []),
        ({"checkpointed": 90}, "CheckpointActivations", []),
        ({"checkpointed": 101, "4 rows": 90}, "CheckpointActivations", []),
        ({"checkpointed": 110, "4 rows": 90}, "SplitBatch", ["CheckpointActivations"]),
        ({"checkpointed": 110, "4 rows": 101}, "CheckpointActivations", []),
        ({"checkpointed": 110, "4 rows": None}, "CheckpointActivations", []),
        ({"checkpointed": 110, "4 rows": 110, "short": 90}, "CheckpointActivations", []),
    ],
)
def test_what_cannot_suffice_is_passed_over_where_something_exact_is_known_to(
    needs: dict[str, Any], chosen: str, passed: list[str]
) -> None:
    assert jumped(needs)[:2] == (chosen, passed)


def test_shorter_rows_are_jumped_to_where_they_would_be_tried_next() -> None:
    order = (CheckpointActivations(), HalveSequence(), SplitBatch())
    needs = {"checkpointed": 110, "short": 90, "4 rows": 90}
    assert jumped(needs, *order)[:2] == ("HalveSequence", ["CheckpointActivations"])


def test_a_halving_rung_is_taken_as_often_as_it_needs_at_once() -> None:
    needs = {"8 rows": 200, "4 rows": 150, "2 rows": 120, "1 rows": 90}
    chosen, passed, plan = jumped(needs, SplitBatch(), PageOptimizer8bit())
    assert (chosen, passed) == ("SplitBatch", ["SplitBatch", "SplitBatch"])
    assert (plan.micro_batch_size, plan.max_pass_tokens) == (1, 1024)
    assert jumped({**needs, "1 rows": 110}, SplitBatch())[:2] == ("SplitBatch", [])


def test_what_there_was_is_what_was_free_and_what_was_held() -> None:
    full = replace(EVENT, free_bytes=10, allocated_bytes=80, reserved_bytes=90)
    assert jump.usable_bytes(full) == 100
    assert jump.usable_bytes(replace(full, reserved_bytes=None)) == 90
    assert jump.usable_bytes(replace(full, free_bytes=0)) is None
    assert jump.usable_bytes(EVENT) is None


@given(rows=st.integers(1, 64), width=st.integers(2, 4096), pair=st.integers(1, 2))
def test_splitting_until_nothing_is_left_ends_with_single_rows(
    rows: int, width: int, pair: int
) -> None:
    event = replace(EVENT, rows=rows, width=width, tokens=rows * width * pair)
    plan: Plan | None = replace(PLAN, per_device_train_batch_size=rows, max_length=None)
    taken = 0
    while plan is not None:
        last, plan = plan, SplitBatch()(plan, event)
        if plan is not None:
            event, taken = jump.failing_again(event, plan), taken + 1
    assert event.rows == 1
    assert event.tokens == width * pair
    assert taken == (rows - 1).bit_length()
    assert last.max_pass_tokens in {None, width * pair}


def test_a_batch_is_as_long_and_has_as_many_rows_as_the_one_that_failed() -> None:
    event = replace(EVENT, rows=3, width=700, tokens=2100)
    assert jump.is_padded(event)
    assert not jump.is_padded(replace(event, tokens=1500))
    failed = jump.as_failed(PLAN, event)
    assert (failed.max_length, failed.micro_batch_size) == (700, 3)
    assert jump.as_failed(PLAN, EVENT) == PLAN
    assert jump.as_failed(replace(PLAN, max_length=512, micro_batch_size=2), event) == replace(
        PLAN, max_length=512, micro_batch_size=2
    )
