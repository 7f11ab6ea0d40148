"""Steps with and without something, told apart in one run."""

from __future__ import annotations

import pytest

from gpu_checks.alternation import compared


def test_steps_after_a_change_are_left_out_and_drift_is_told() -> None:
    # Blocks of four: without, with, without, with. The first step has no start.
    without, again = [9.0, 1.0, 1.0], [9.0, 9.0, 1.5, 1.5]
    within = [9.0, 9.0, 1.5, 1.5]
    row = compared(
        [*without, *within, *again, *within],
        lambda step: step // 4 % 2 == 1,
        block=4,
        skipped=2,
        names=("plain", "watched"),
    )
    assert row == {
        "steps_each": 4,
        "plain_step_s": 1.25,
        "watched_step_s": 1.5,
        "overhead_pct": pytest.approx(20.0),
        "plain_second_half_against_first_pct": pytest.approx(50.0),
    }
