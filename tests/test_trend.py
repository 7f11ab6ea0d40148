from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomguard.errors import ConfigurationError
from oomguard.watch.trend import Creep, CreepDetector
from tests import series, verdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MIB = 2**20
GIB = 2**30


def found(
    values: Iterable[int], detector: CreepDetector | None = None, **known: Any
) -> list[tuple[int, Creep]]:
    """The findings in a series of readings, each with the step that brought it, from 1."""
    detector = detector or CreepDetector()
    updates = ((step, detector.update(value, **known)) for step, value in enumerate(values, 1))
    return [(step, creep) for step, creep in updates if creep is not None]


def ramp(steps: int, per_step: int, start: int = 4 * GIB) -> list[int]:
    return [start + per_step * step for step in range(steps)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**80), st.none() | st.integers(-(2**60), 2**60))
def test_what_stays_the_same_is_never_reported(held: int, headroom: int | None) -> None:
    assert not found([held] * 600, headroom_bytes=headroom)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(MIB // 4, 64 * MIB),
    st.integers(0, 100 * GIB),
    st.none() | st.integers(0, 200 * GIB),
)
def test_a_ramp_is_reported_with_its_slope(per_step: int, start: int, headroom: int | None) -> None:
    (step, creep), *_ = found(ramp(1100, per_step, start), headroom_bytes=headroom)
    assert creep.bytes_per_step == pytest.approx(per_step, rel=0.02)
    assert creep.phase == "train"
    assert creep.since_step + creep.steps == step
    assert creep.bytes_so_far == pytest.approx(per_step * creep.steps, rel=0.2)
    assert not creep.withdrawn


def test_a_ramp_is_reported_again_only_when_it_grew_by_half() -> None:
    creeps = [creep for _, creep in found(ramp(6000, MIB))]
    grown = [creep.bytes_so_far for creep in creeps]
    assert 2 < len(grown) < 10
    assert all(later >= 1.5 * before for before, later in pairwise(grown))
    assert not any(creep.withdrawn for creep in creeps)


def test_a_finding_is_withdrawn_when_growth_stops() -> None:
    detector = CreepDetector()
    values = ramp(1500, MIB)
    (_, first), *_ = found(values, detector)
    assert detector.active is not None
    after = found([values[-1]] * 1500, detector)
    ((step, last),) = [(step, creep) for step, creep in after if creep.withdrawn]
    assert last.since_step == first.since_step
    assert last.full_at_step is None
    assert step < 900
    assert after[-1] == (step, last)
    assert detector.active is None


def test_growth_that_starts_again_is_a_new_finding() -> None:
    values = ramp(1000, MIB)
    values += [values[-1]] * 1500
    values += ramp(1500, MIB, values[-1])
    kinds = [(creep.withdrawn, creep.since_step) for _, creep in found(values)]
    assert [withdrawn for withdrawn, _ in kinds].count(True) == 1
    withdrawn_at = [withdrawn for withdrawn, _ in kinds].index(True)
    assert kinds[withdrawn_at + 1][1] == pytest.approx(2500, abs=150)


def test_what_falls_back_is_withdrawn_at_once() -> None:
    detector = CreepDetector()
    values = ramp(1200, MIB)
    assert found(values, detector)
    (step, last), *_ = found([values[0]] * 400, detector)
    assert last.withdrawn
    assert step <= 100


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.integers(0, 50 * GIB))
def test_units_and_a_level_below_change_nothing(seed: int, factor: int, level: int) -> None:
    rng = np.random.default_rng(seed)
    noise = [int(rng.normal(0, 20 * MIB)) for _ in range(1500)]
    values = [value + extra for value, extra in zip(ramp(1500, MIB), noise, strict=True)]
    plain = found(values, CreepDetector(min_bytes=16 * MIB), headroom_bytes=30 * GIB)
    scaled = found(
        [factor * (value + level) for value in values],
        CreepDetector(min_bytes=16 * MIB * factor),
        headroom_bytes=factor * 30 * GIB,
    )
    assert plain
    assert [step for step, _ in plain] == [step for step, _ in scaled]
    for (_, one), (_, other) in zip(plain, scaled, strict=True):
        assert other.bytes_per_step == pytest.approx(factor * one.bytes_per_step, rel=1e-3)


@pytest.mark.parametrize("late", [0, 160, 1600])
def test_a_leak_that_starts_later_is_found_later(late: int) -> None:
    values = [4 * GIB] * late + ramp(1500, MIB)
    (_, creep), *_ = found(values, headroom_bytes=2 * GIB)
    assert creep.since_step == pytest.approx(max(late, 33), abs=100)


def test_the_card_is_full_within_the_range_told() -> None:
    detector, told, full = CreepDetector(), None, 0
    rng = np.random.default_rng(0)
    for step in range(1, 5000):
        free = 4 * GIB - step * MIB
        if free < 0:
            full = step
            break
        creep = detector.update(
            8 * GIB + step * MIB + int(rng.normal(0, 30 * MIB)), headroom_bytes=free
        )
        told = told or creep
    assert told is not None
    assert told.full_at_step is not None
    assert told.full_at_step[0] - 100 <= full <= told.full_at_step[1] + 100
    assert told.steps < full // 2


def test_a_few_kilobytes_a_step_are_found_in_a_long_run() -> None:
    values = ramp(70_000, 3000)
    (step, creep), *more = found(values, headroom_bytes=40 * GIB)
    assert step < 20_000
    assert creep.bytes_per_step == pytest.approx(3000, rel=0.01)
    assert not any(later.withdrawn for _, later in more)


@pytest.mark.parametrize("phase", ["eval", "save", "recovery", "on_log"])
def test_growth_is_put_down_to_the_phase_that_leaves_it(phase: str) -> None:
    detector, creeps, held = CreepDetector(), [], 4 * GIB
    for step in range(1, 2000):
        ran = step % 150 == 0
        held += 40 * MIB if ran else 0
        creeps.append(
            detector.update(
                held + step % 7 * MIB // 4,
                event=phase if ran else ("logging" if step % 10 == 0 else None),
            )
        )
    first = next(creep for creep in creeps if creep is not None)
    assert first.phase == phase
    assert first.bytes_per_step == pytest.approx(40 * MIB / 150, rel=0.3)


def test_phases_that_always_run_together_are_named_together() -> None:
    detector, creeps, held = CreepDetector(), [], 4 * GIB
    for step in range(1, 2000):
        ran = step % 150 == 0
        held += 40 * MIB if ran else 0
        creeps.append(detector.update(held, event="save+epoch+eval" if ran else "train"))
    assert next(creep for creep in creeps if creep is not None).phase == "eval+save"


def test_a_leak_in_every_step_is_not_put_down_to_evaluations() -> None:
    detector, creeps = CreepDetector(), []
    for step, value in enumerate(ramp(2000, MIB), 1):
        creeps.append(detector.update(value, event="eval" if step % 100 == 0 else None))
    assert next(creep for creep in creeps if creep is not None).phase == "train"


def test_what_a_profiler_records_is_no_creep() -> None:
    detector, held = CreepDetector(), 4 * GIB
    for step in range(1, 3000):
        on = step % 1000 > 300
        held = held + 4 * MIB if on else 4 * GIB
        assert detector.update(held, event="profiler" if on else None) is None


def test_optimizer_state_that_comes_late_is_accounted_for() -> None:
    detector = CreepDetector()
    for value in ramp(2000, MIB):
        assert detector.update(value, accounted_bytes=value - GIB, headroom_bytes=GIB) is None


def test_memory_that_follows_the_batch_is_no_creep() -> None:
    rng, detector = np.random.default_rng(1), CreepDetector()
    for step in range(1, 3000):
        tokens = int(rng.uniform(0.5, 1.5) * (1000 + step))
        held = 4 * GIB + tokens * MIB // 8
        assert detector.update(held, batch_tokens=tokens, headroom_bytes=20 * GIB) is None


ODD = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 10**400, -(10**400), math.inf, -math.inf, math.nan]),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(ODD, ODD, ODD, ODD, st.text(max_size=6)), min_size=1, max_size=6))
def test_odd_readings_raise_nothing(odd: list[tuple[Any, Any, Any, Any, str]]) -> None:
    detector = CreepDetector()
    for step in range(300):
        allocated, accounted, tokens, headroom, event = odd[step % len(odd)]
        detector.update(
            allocated if step % 3 else step * MIB,
            accounted_bytes=accounted,
            batch_tokens=tokens,
            event=event,
            headroom_bytes=headroom,
        )


@pytest.mark.parametrize("given_", [{"min_bytes": 0}, {"warmup_steps": -1}])
def test_limits_that_mean_nothing_are_refused(given_: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="min_bytes"):
        CreepDetector(**given_)


def test_the_detector_does_without_torch() -> None:
    code = "import sys, oomguard.watch.trend; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 - the text is our own


def test_a_finding_cannot_be_changed() -> None:
    (_, creep), *_ = found(ramp(600, MIB))
    with pytest.raises(FrozenInstanceError):
        creep.phase = "eval"  # type: ignore[misc]


def test_a_sample_of_made_up_runs_is_told_apart() -> None:
    runs = [*series.tuned(18, 40_000), *series.held_out(8, 50_000)]
    score = verdicts.measure(runs, {"creep": verdicts.Creep})["creep"]
    assert score.recall >= 0.92, score.wrong
    assert score.clean_alarmed <= 0.08, score.wrong
    assert score.warned >= 0.9
    assert score.us_per_step <= 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "false_alarms", "clean_alarmed"),
    [(series.tuned, 0.15, 0.035), (series.held_out, 0.2, 0.05)],
)
def test_made_up_runs_are_told_apart(
    family: Callable[[int, int], Iterable[series.Run]], false_alarms: float, clean_alarmed: float
) -> None:
    score = verdicts.measure(family(300, 60_000), {"creep": verdicts.Creep})["creep"]
    assert score.recall >= 0.95, score.wrong
    assert score.false_alarms <= false_alarms, score.wrong
    assert score.clean_alarmed <= clean_alarmed, score.wrong
    assert score.warned >= 0.95
    assert score.us_per_step <= 30
