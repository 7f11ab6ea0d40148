"""`fit` and `Guard`: what they report, and what they leave behind."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import oomguard
from oomguard import ConfigurationError, Guard, HalveSequence, Ladder, SplitBatch
from oomguard.errors import LadderExhaustedError
from oomguard.report import Report
from tests.kinds import NOTHING, fit, is_left_alone, make
from tests.tiny import largest_difference, weights

if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput

    from oomguard import OOMEvent, Plan

SPLIT = Ladder(SplitBatch())


def saved(trainer: Any) -> Report:
    return Report.load(Path(trainer.args.output_dir) / "oomguard.json")


class Remembering(Trainer):
    output: TrainOutput

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.output = super().train(*args, **kwargs)
        return self.output


def test_the_report_has_the_output_the_plans_and_the_recoveries(tmp_path: Path) -> None:
    trainer = make(tmp_path, Remembering)
    report = fit(trainer, ladder=SPLIT)
    assert report.train_output is trainer.output
    assert (report.status, report.error, report.ladder) == ("finished", None, ("SplitBatch",))
    (recovery,) = report.recoveries
    assert (recovery.rung, recovery.event.step) == ("SplitBatch", 2)
    assert (recovery.before, recovery.after) == (report.initial_plan, report.plan)
    sizes = report.initial_plan.micro_batch_size, report.plan.micro_batch_size
    assert (sizes, report.plan.optim) == ((None, 2), "adamw_torch_fused")
    assert 0 < report.seconds_lost < report.seconds
    assert saved(trainer) == report
    assert is_left_alone(trainer, Remembering)


def test_a_guard_reports_what_train_returned(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1)
    with Guard(trainer) as guard:
        output = trainer.train()
    assert guard.report.train_output is output


OF_PASSES = Ladder(oomguard.CheckpointActivations(), HalveSequence(), SplitBatch())


class Stop(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("event", "step", "leave", "phase"),
    [
        ("on_step_begin", 3, NOTHING, "(forward|backward)"),
        ("on_substep_end", 3, NOTHING // 4, "(forward|backward)"),
        ("on_pre_optimizer_step", 1, 0, "optimizer"),
    ],
)
def test_a_spent_ladder_leaves_the_last_complete_step_and_a_trainer_to_go_on_with(
    tmp_path: Path, event: str, step: int, leave: int, phase: str
) -> None:
    trainer = make(tmp_path / "run", save_strategy="steps", save_steps=1)
    stopped, twin = make(tmp_path), make(tmp_path)
    twin.train()
    stopped.add_callback(Stop(step - 1))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(trainer, step, leave, event, ladder=OF_PASSES)
    assert isinstance(caught.value, LadderExhaustedError)
    text = str(caught.value)
    sizes = r"\(asked [\d.]+ \w+, free [\d.]+ \w+, of 1024.00 MiB\)"
    assert re.match(f"Out of memory in {phase} of optimizer step {step} {sizes}, and the", text)
    words = {"optimizer": "CheckpointActivations: it frees nothing in optimizer"}
    assert words.get(phase, "CheckpointActivations x 1") in text
    halve = {"optimizer": "HalveSequence: it frees nothing in optimizer"}
    assert halve.get(phase, "HalveSequence: rows of 48 tokens are not above floor=256") in text
    assert f"those after step {step - 1}. What to change: (a) allow shorter rows" in text
    assert largest_difference(weights(trainer), weights(stopped)) < 1e-7
    assert phase == "optimizer" or not any(p.grad is not None for p in trainer.model.parameters())
    moments, expected = (t.optimizer.state_dict()["state"] for t in (trainer, stopped))
    torch.testing.assert_close(moments, expected, rtol=0, atol=1e-9)
    assert is_left_alone(trainer)
    report = saved(trainer)
    assert (report.status, report.train_output) == ("failed", None)
    assert report.error == f"LadderExhaustedError: {text}"
    report = fit(trainer, step, 2**29, resume_from_checkpoint=step > 1)
    assert (report.status, report.recoveries) == ("finished", [])
    assert largest_difference(weights(trainer), weights(twin)) < 1e-6


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("mine"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_an_error_of_the_users_own_passes_through_and_is_reported(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    class Raises(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise error

    trainer = make(tmp_path)
    trainer.add_callback(Raises())
    with pytest.raises(type(error)) as caught:
        oomguard.fit(trainer)
    assert caught.value is error
    assert is_left_alone(trainer)
    report = saved(trainer)
    assert (report.status, report.error) == (status, f"{type(error).__name__}: {error}")


def test_a_report_that_cannot_be_written_does_not_cost_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "oomguard.json").mkdir()
    assert oomguard.fit(make(tmp_path)).status == "finished"
    assert "The report could not be written to" in caplog.text


def test_a_recovery_is_one_line_of_the_log_and_a_skipped_rung_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "oomguard")
    fit(make(tmp_path), ladder=Ladder(HalveSequence(floor=64), SplitBatch()))
    skipped, recovered = [record.message for record in caplog.records if record.name == "oomguard"]
    assert skipped == "HalveSequence skipped: rows of 48 tokens are not above floor=64"
    assert re.fullmatch(
        r"step 2: out of memory in (forward|backward) \(asked [\d.]+ KiB, free [\d.]+ KiB\): "
        r"SplitBatch \(exact\), 4 x 2 -> 2 x 4 passes, effective batch 8 unchanged; "
        r"step 2 redone, \d\.\d s lost",
        recovered,
    )


@pytest.mark.parametrize("terminal", ["", "1"])
def test_the_table_is_shown_where_a_terminal_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: str,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", terminal)  # by which rich takes any output for a terminal
    fit(make(tmp_path), ladder=SPLIT)
    shown = capsys.readouterr().out
    assert ("oomguard: 1 recovery" in shown) is ("SplitBatch" in shown) is bool(terminal)


def half_the_tokens(plan: Plan, event: OOMEvent) -> Plan | None:
    if plan.max_pass_tokens is not None or event.tokens is None:
        return None
    return replace(plan, max_pass_tokens=event.tokens // 2)


def half_the_batch(plan: Plan, event: OOMEvent) -> Plan:
    return replace(plan, per_device_train_batch_size=2)


def test_a_function_is_a_rung_under_its_own_name_and_counts_as_semantic(tmp_path: Path) -> None:
    report = fit(make(tmp_path), ladder=Ladder(half_the_tokens))
    (recovery,) = report.recoveries
    assert (recovery.rung, recovery.fidelity) == ("half_the_tokens", oomguard.Fidelity.SEMANTIC)
    assert (report.ladder, report.plan.max_pass_tokens) == (("half_the_tokens",), 4 * 48 // 2)


def test_a_rung_that_changes_the_effective_batch_is_refused_with_both_sizes(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    words = "half_the_batch would change the effective batch size from 8 to 4"
    with pytest.raises(ConfigurationError, match=words):
        fit(trainer, ladder=Ladder(half_the_batch))
    assert is_left_alone(trainer)
    assert saved(trainer).status == "failed"


class Wishful(oomguard.Rung):
    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        return replace(plan, world_size=2, gradient_accumulation_steps=1)


def test_a_rung_that_no_lever_can_obey_is_left_out_by_name(tmp_path: Path) -> None:
    words = (
        "Taken so far: no rung. Left out: Wishful: no lever changes gradient_accumulation_steps, "
    )
    with pytest.raises(LadderExhaustedError, match=words):
        fit(make(tmp_path), ladder=Ladder(Wishful()))
