"""Which plans are tried: on a card whose true bytes are some multiple of the estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomguard.largest_plan import best
from oomguard.search_space import space
from oomguard.trials import MOST_TRIALS, settle
from tests.test_search_space import START, bytes_of

if TYPE_CHECKING:
    from oomguard.plan import Plan


@dataclass
class Run:
    """A trial on a card where plans take `factor` times what is estimated."""

    plan: Plan
    fits: bool
    true_bytes: float


def settled(maximize: str, limit: float, factor: float) -> list[Run]:
    searched = space(START, maximize, keeps_batch=maximize != "tokens")

    def search(scale: float) -> Plan | None:
        found = best(searched, lambda plan: bytes_of(plan) * scale <= limit)
        return next(iter(found), None)

    def run(plan: Plan) -> Run:
        true_bytes = bytes_of(plan) * factor
        return Run(plan, true_bytes <= limit, true_bytes)

    def ratio(tried: Run) -> float:
        return tried.true_bytes / bytes_of(tried.plan)

    return settle(search, run, ratio, searched.smallest)


@settings(deadline=None)
@given(
    st.sampled_from(["tokens", "max_length", "micro_batch_size"]),
    st.floats(2e9, 4e10),
    st.floats(0.1, 10),
)
def test_no_plan_is_run_twice_and_four_at_most(maximize: str, limit: float, factor: float) -> None:
    runs = settled(maximize, limit, factor)
    plans = [run.plan for run in runs]
    assert 1 <= len(plans) <= MOST_TRIALS
    assert len(set(plans)) == len(plans)
    sizes = [bytes_of(run.plan) for run in runs if run.fits]
    assert sizes == sorted(sizes), "the last that fits is the largest"
    smallest = replace(START, per_device_train_batch_size=1, max_length=256)
    if maximize == "tokens" and bytes_of(smallest) * factor <= limit:
        assert sizes, "the smallest plan is the last that is tried"


@pytest.mark.parametrize("factor", [0.6, 0.8, 0.98, 1.0, 1.01, 1.05])
def test_the_card_is_nearly_full_in_the_end(factor: float) -> None:
    runs = settled("tokens", 12e9, factor)
    assert [run for run in runs if run.fits][-1].true_bytes >= 0.9 * 12e9


def test_a_good_estimate_takes_one_trial() -> None:
    assert [run.fits for run in settled("tokens", 12e9, 0.995)] == [True]


def test_of_few_numbers_of_rows_none_is_skipped() -> None:
    limit = float(bytes_of(replace(START, per_device_train_batch_size=3)) * 1.7 + 1)
    runs = settled("micro_batch_size", limit, 1.7)
    assert [run for run in runs if run.fits][-1].plan.per_device_train_batch_size == 3
