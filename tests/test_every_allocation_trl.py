"""One allocation fails in a step of a preference trainer, or of one that samples: no trace."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from typing import Any

import pytest

from oomguard.ladder import Ladder
from oomguard.rungs import SplitBatch
from oomguard.testing import VirtualCard
from tests import tiny
from tests.allocations import NEVER_SPENT
from tests.preferences import dpo
from tests.sampling import grpo
from tests.test_every_allocation import PARTS, PHASES, Step, faults_that_show, without_faults
from tests.test_sampling import CLOSE
from tests.twin import Build, beyond, differences, run

pytestmark = tiny.needs_rows_of_pairs


DPO = (
    *("mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen"),
    *("logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"),
)
ONE: Any = {"max_steps": 1, "logging_steps": 1}
BUILDS: dict[str, Build] = {
    "dpo": partial(dpo, **ONE),
    # Sampled twice within the step, and compared with a reference.
    "grpo": partial(
        grpo,
        **ONE,
        beta=0.1,
        steps_per_generation=1,
        per_device_train_batch_size=4,
        max_completion_length=4,
    ),
}


@cache
def step(kind: str) -> Step:
    return without_faults(BUILDS[kind])


@pytest.mark.parametrize("kind", BUILDS)
def test_the_step_allocates_in_every_phase(kind: str) -> None:
    extra = {"generate"} if kind == "grpo" else set()
    assert set(step(kind).phases) == PHASES | extra
    assert step(kind).allocations > 500


@pytest.mark.parametrize("kind", BUILDS)
def test_any_allocation_may_fail(kind: str) -> None:
    assert not faults_that_show(step(kind), [(k,) for k in step(kind).sample()[::3]], "default")


@pytest.mark.parametrize("kind", BUILDS)
def test_any_allocation_may_fail_and_another_while_that_is_made_good(kind: str) -> None:
    # Not in sampling: there a second error in a row is the end.
    count, phases = step(kind).allocations, step(kind).phases
    faults = [(k, k + 40) for k in step(kind).sample()[1::6] if k + 40 <= count]
    trained = [fault for fault in faults if phases[fault[0] - 1] != "generate"]
    assert not faults_that_show(step(kind), trained, NEVER_SPENT)


@pytest.mark.parametrize("kind", BUILDS)
def test_any_allocation_of_forward_and_backward_may_fail_and_split_the_batch(kind: str) -> None:
    close = CLOSE | dict.fromkeys(DPO, 1e-6)
    places = [
        number
        for number, phase in enumerate(step(kind).phases, 1)
        if phase in {"forward", "backward"}
    ]
    for number in places[:: len(places) // 6]:
        recovered = run(BUILDS[kind], Ladder(SplitBatch()), card=VirtualCard(fail_at=number))
        assert recovered.rungs == ["SplitBatch"]
        assert not beyond(differences(recovered, step(kind).twin), close), number


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", BUILDS)
def test_every_allocation_may_fail(
    kind: str, part: int, capsys: pytest.CaptureFixture[str]
) -> None:
    count = step(kind).allocations
    every = range(1 + part, count + 1, PARTS)
    found = faults_that_show(step(kind), [(k,) for k in every], "default")
    with capsys.disabled():
        print(f"\n{len(every)} of {count} allocations failed: {Counter(step(kind).phases)}")
    assert not found
