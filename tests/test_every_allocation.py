"""One allocation fails, whichever it is: the training ends as if it had not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import pytest
from peft import LoraConfig

from oomguard.testing import VirtualCard
from tests import tiny
from tests.allocations import NEVER_SPENT, LoggingCard
from tests.twin import Build, Run, differences, run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from datasets import Dataset
    from transformers import Trainer

    from oomguard.ladder import Ladder

PHASES = {"setup", "fetch", "forward", "backward", "clip", "optimizer", "bookkeeping"}
PARTS = 16  # of the exhaustive tests, so that all cores take part
SAMPLE = 13  # allocations of the default run, spread over the step, besides one of each phase

LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules="all-linear",
    lora_dropout=0.1,  # other random numbers would show
    init_lora_weights=False,  # B is not 0: every weight has a gradient at the first step
    task_type="CAUSAL_LM",
)


@cache
def rows() -> Dataset:
    # Few and short: the number of allocations does not depend on it.
    texts = [text[:120] for text in tiny.texts()[:16]]
    return tiny.text_dataset(0).from_dict(tiny.tokenizer()(texts, return_attention_mask=False))


def trainer(folder: Path) -> Trainer:
    """One optimizer step of two batches, whose gradients are clipped."""
    return tiny.sft_trainer(folder, lora=LORA, dataset=rows(), max_steps=1, max_grad_norm=0.05)


def packing_trainer(folder: Path) -> Trainer:
    """The same with batches whose size only their tensors tell."""
    return tiny.sft_trainer(
        folder, lora=LORA, dataset=rows(), max_steps=1, packing=True, per_device_train_batch_size=1
    )


@dataclass(frozen=True)
class Step:
    """The training that meets no error, and the phases of its allocations."""

    build: Build
    twin: Run
    phases: tuple[str, ...]

    @property
    def allocations(self) -> int:
        return len(self.phases)

    def sample(self) -> list[int]:
        first_of_phase = {self.phases.index(phase) + 1 for phase in set(self.phases)}
        even = {1 + index * (self.allocations - 1) // (SAMPLE - 1) for index in range(SAMPLE)}
        return sorted(first_of_phase | even)


def without_faults(build: Build) -> Step:
    card = LoggingCard(build)
    clean = run(card.build, "default", card=card)
    assert not clean.recoveries
    assert len(card.places) == card.allocations
    twin = run(build)
    assert not differences(clean, twin)
    return Step(build, twin, tuple(phase for phase, _ in card.places))


@pytest.fixture(scope="module")
def step() -> Step:
    return without_faults(trainer)


def faults_that_show(
    step: Step, faults: Iterable[tuple[int, ...]], ladder: Ladder | str
) -> dict[tuple[int, ...], str]:
    """What is wrong with the trainings in which these allocations fail."""
    found = {}
    for fault in faults:
        card = VirtualCard(fail_at=fault)
        try:
            faulted = run(step.build, ladder, card=card)
        except Exception as error:  # noqa: BLE001 - which allocation it was is the finding
            found[fault] = f"{type(error).__name__}: {error}"
            continue
        wrong = differences(faulted, step.twin)
        phases = [recovery.event.phase for recovery in faulted.recoveries]
        # What fails a second time in clipping goes to the host and is no second recovery.
        met = 0 < len(phases) <= len(fault) and phases[0] == step.phases[fault[0] - 1]
        if wrong or not met:
            found[fault] = f"differs in {wrong}, recovered in {phases}"
    return found


def test_the_step_allocates_in_every_phase(step: Step) -> None:
    assert set(step.phases) == PHASES
    assert step.allocations > 500
    # The last is behind the last optimizer step: what the trainer logs at the end.
    assert step.phases[-1] == "bookkeeping"


def test_any_allocation_may_fail(step: Step) -> None:
    assert not faults_that_show(step, [(k,) for k in step.sample()], "default")


@pytest.mark.parametrize("gap", [1, 40])
def test_any_allocation_may_fail_and_another_while_that_is_made_good(step: Step, gap: int) -> None:
    # With a gap of 1 the repeated operation fails again, or the first one of the replay; with a
    # larger one something in the middle of the replay, or further on.
    faults = [(k, k + gap) for k in step.sample()[::3] if k + gap <= step.allocations]
    assert not faults_that_show(step, faults, NEVER_SPENT)


def test_any_allocation_may_fail_and_the_next_one_with_packed_batches() -> None:
    step = without_faults(packing_trainer)
    faults = [(k, k + 1) for k in step.sample()[::3] if k < step.allocations]
    assert not faults_that_show(step, faults, NEVER_SPENT)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_allocation_may_fail(
    part: int, step: Step, capsys: pytest.CaptureFixture[str]
) -> None:
    every = range(1 + part, step.allocations + 1, PARTS)
    found = faults_that_show(step, [(k,) for k in every], "default")
    with capsys.disabled():
        print(f"\n{len(every)} of {step.allocations} allocations failed: {Counter(step.phases)}")
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_second_failure_in_a_row_is_made_good(
    part: int, step: Step, capsys: pytest.CaptureFixture[str]
) -> None:
    every = range(1 + part, step.allocations, PARTS)
    found = faults_that_show(step, [(k, k + 1) for k in every], NEVER_SPENT)
    with capsys.disabled():
        print(f"\n{len(every)} of {step.allocations - 1} pairs of neighbouring ones failed")
    assert not found
