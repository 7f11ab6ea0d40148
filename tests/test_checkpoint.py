"""A run that goes on in a new process is the one that was not interrupted."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from peft import PeftModel

import oomguard
from oomguard import ConfigurationError, Plan
from oomguard.checkpoint import OomguardState, Reached, read
from oomguard.ladder import Ladder
from oomguard.levers import adapter
from oomguard.rungs import (
    CheckpointActivations,
    HalveSequence,
    LowerRank,
    NarrowTargets,
    PageOptimizer8bit,
    SplitBatch,
)
from tests import tiny
from tests.test_twin_rungs import BUILDS, SIZES, lora
from tests.twin import EXACT, Faults, Run, assert_same, run

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.report import Report

LADDERS: dict[str, Ladder] = {
    "no rung": Ladder(LowerRank()),
    "passes": Ladder(CheckpointActivations(), HalveSequence(floor=48), SplitBatch()),
    "optimizer": Ladder(PageOptimizer8bit()),
    "adapters": Ladder(NarrowTargets(), LowerRank()),
    "everything": Ladder(
        CheckpointActivations(),
        HalveSequence(floor=48),
        SplitBatch(),
        PageOptimizer8bit(),
        NarrowTargets(at_once=True),
        LowerRank(),
    ),
}
FAILURES = {"no rung": 0, "passes": 3, "optimizer": 1, "adapters": 2, "everything": 7}
CASES = [
    *(("LoRA", ladder) for ladder in LADDERS),
    ("QLoRA", "everything"),
    ("PiSSA", "everything"),
    ("full", "optimizer"),
]


def interrupted(build: Any, folder: Path, ladder: str) -> tuple[Run, Run]:
    """A run with failures in its second step, and one that goes on from its third step."""
    saving = partial(build, save_strategy="steps", save_steps=1)
    faults: Faults = {("forward", 3 + n): 2 for n in range(FAILURES[ladder])}
    whole = run(saving, LADDERS[ladder], faults, folder=folder)
    resumed = run(
        saving,
        LADDERS[ladder],
        folder=folder,
        earlier=FAILURES[ladder],
        resume_from_checkpoint=str(folder / "checkpoint-3"),
    )
    return whole, resumed


@pytest.mark.parametrize(("build", "ladder"), CASES)
def test_a_resumed_run_ends_like_the_one_that_was_not_interrupted(
    build: str, ladder: str, tmp_path: Path
) -> None:
    whole, resumed = interrupted(BUILDS[build], tmp_path, ladder)
    for seen in (whole, resumed):  # what each saw of it begins elsewhere
        seen.events.clear()
        seen.order.clear()
        seen.logs[:] = [line for line in seen.logs if "train_loss" not in line]
        for line in seen.logs:
            line.pop("num_tokens", None)  # TRL counts them from 0 when it resumes
    assert_same(resumed, whole, EXACT)
    assert resumed.report is not None
    assert whole.report is not None
    assert resumed.report.plan == whole.report.plan
    assert resumed.rungs == whole.rungs
    assert len(resumed.rungs) == FAILURES[ladder]


def test_a_resumed_adapter_loads_in_plain_peft(tmp_path: Path) -> None:
    interrupted(BUILDS["LoRA"], tmp_path, "everything")
    model = PeftModel.from_pretrained(tiny.llama(**SIZES), tmp_path / "checkpoint-4")
    config: Any = model.peft_config["default"]
    assert set(config.rank_pattern.values()) == {4}, "most adapters were frozen before"


def test_a_later_failure_goes_on_from_the_rung_that_was_reached(tmp_path: Path) -> None:
    saving = partial(lora, save_strategy="steps", save_steps=1)
    ladder = Ladder(CheckpointActivations(), SplitBatch())
    run(saving, ladder, {("forward", 3): 2}, folder=tmp_path)
    again = {("forward", 1): 2}
    trainer = saving(tmp_path)
    report = resume(trainer, ladder, tmp_path / "checkpoint-3", again)
    assert [r.rung for r in report.recoveries] == ["CheckpointActivations", "SplitBatch"]
    assert report.recoveries[1].before.gradient_checkpointing


def resume(trainer: Any, ladder: Ladder, checkpoint: Path, faults: Faults) -> Report:
    report = run(
        lambda _: trainer, ladder, faults, earlier=1, resume_from_checkpoint=str(checkpoint)
    ).report
    assert report is not None
    return report


def test_a_checkpoint_of_a_run_without_a_guard_can_be_resumed(tmp_path: Path) -> None:
    saving = partial(lora, save_strategy="steps", save_steps=1)
    plain = run(saving, folder=tmp_path)
    assert read(tmp_path / "checkpoint-3") is None
    guarded = run(
        saving, "default", folder=tmp_path, resume_from_checkpoint=f"{tmp_path}/checkpoint-3"
    )
    assert guarded.weights.keys() == plain.weights.keys()
    assert tiny.largest_difference(guarded.weights, plain.weights) == 0
    assert read(tmp_path / "checkpoint-4") is not None


def test_a_guarded_checkpoint_can_be_resumed_without_a_guard(tmp_path: Path) -> None:
    saving = partial(lora, save_strategy="steps", save_steps=1)
    for restore in (False, True):
        guarded = run(saving, "default", folder=tmp_path / str(restore))
        restoring = partial(saving, restore_callback_states_from_checkpoint=restore)
        for ladder in (None, "default"):
            checkpoint = str(tmp_path / str(restore) / "checkpoint-3")
            plain = run(
                restoring, ladder, folder=tmp_path / str(restore), resume_from_checkpoint=checkpoint
            )
            assert tiny.largest_difference(guarded.weights, plain.weights) == 0
        held = json.loads((tmp_path / str(restore) / "checkpoint-4/trainer_state.json").read_text())
        assert OomguardState.__name__ in held["stateful_callbacks"]


def test_the_callback_is_gone_after_the_run(tmp_path: Path) -> None:
    trainer = lora(tmp_path, max_steps=1)
    before = [type(c).__name__ for c in trainer.callback_handler.callbacks]
    oomguard.fit(trainer)
    assert [type(c).__name__ for c in trainer.callback_handler.callbacks] == before


def test_a_new_run_begins_on_the_last_plan(tmp_path: Path) -> None:
    ladder = LADDERS["everything"]
    faults: Faults = {("forward", 3 + n): 2 for n in range(7)}
    first = run(lora, ladder, faults, folder=tmp_path).report
    trainer: Any = lora(tmp_path)
    report = oomguard.fit(trainer, ladder=ladder, plan="last")
    assert first is not None
    assert (report.plan, report.recoveries) == (first.plan, [])
    assert report.initial_plan == first.initial_plan
    assert trainer.args.optim == "adamw_8bit"
    assert adapter.largest_rank(trainer) == 4


def test_a_new_run_begins_on_a_plan_that_is_given(tmp_path: Path) -> None:
    trainer = lora(tmp_path, max_steps=1)
    with oomguard.Guard(trainer) as guard:
        own = guard.report.plan
    wanted = Plan(
        **{**own.to_dict(), "gradient_checkpointing": True, "target_modules": own.target_modules}
    )
    report = oomguard.fit(trainer, plan=wanted)
    assert report.plan == wanted


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("best", "plan='best': give a Plan, 'last' or None"),
        ("last", "oomguard.json: cannot be read"),
        (
            Plan(per_device_train_batch_size=1, max_length=96, lora_r=8),
            "no lever changes .*per_device_train_batch_size",
        ),
    ],
)
def test_a_plan_that_cannot_be_begun_with_is_refused(tmp_path: Path, plan: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        oomguard.fit(lora(tmp_path), plan=plan)


def test_a_plan_and_a_checkpoint_contradict_each_other(tmp_path: Path) -> None:
    saving = partial(lora, save_strategy="steps", save_steps=2)
    run(saving, "default", folder=tmp_path)
    with pytest.raises(ConfigurationError, match="contradict each other"):
        oomguard.fit(saving(tmp_path), plan="last", resume_from_checkpoint=True)


def test_a_trainer_that_is_lower_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    saving = partial(lora, save_strategy="steps", save_steps=1)
    trainer = saving(tmp_path)
    run(lambda _: trainer, Ladder(LowerRank()), {("forward", 3): 2}, folder=tmp_path)
    with pytest.raises(ConfigurationError, match="lora_r is 4 here and was 8 there"):
        oomguard.fit(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    state = {"stateful_callbacks": {"OomguardState": {"attributes": {"saved": {"plan": 1}}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigurationError, match="its OomguardState entry is not one"):
        read(tmp_path)


def test_what_the_user_changed_between_two_runs_stays() -> None:
    before = Plan(per_device_train_batch_size=4, max_length=96, target_modules=("a", "b", "c"))
    after = Plan(per_device_train_batch_size=4, max_length=48, target_modules=("b", "c"))
    now = Plan(per_device_train_batch_size=2, max_length=128, target_modules=("a", "c", "d"))
    reached = Reached(before, after).over(now)
    assert (reached.per_device_train_batch_size, reached.max_length) == (2, 48)
    assert reached.target_modules == ("c", "d")
