"""The recording of guarded runs and of resumed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from transformers import TrainerCallback

import oomguard
from oomguard.ladder import Ladder
from oomguard.testing import VirtualCard
from oomguard.watch.recorder import VRAMRecorder
from oomguard.watch.series import FILE_NAME, Series
from tests.reporting import Fails, Heard, make, vram

if TYPE_CHECKING:
    from pathlib import Path


def test_a_resumed_run_goes_on_with_the_file_from_its_checkpoint(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    reporter = oomguard.VRAMReporter()
    trainer = make(tmp_path, reporter, Fails(3), **saves)
    with pytest.raises(ValueError, match="own"):
        trainer.train()
    reporter.close()
    first = Series.load(tmp_path / FILE_NAME).readings
    assert [(row.step, row.phase) for row in first][-1] == (3, "train")
    make(tmp_path, oomguard.VRAMReporter(), **saves).train(resume_from_checkpoint=True)
    rows = Series.load(tmp_path / FILE_NAME).readings
    assert rows[:3] == first[:3]
    assert [row.step for row in rows] == [1, 2, 2, 3, 4, 4]
    assert [row.time_s for row in rows] == sorted({row.time_s for row in rows})
    make(tmp_path, oomguard.VRAMReporter(), max_steps=1).train()
    assert [row.step for row in Series.load(tmp_path / FILE_NAME).readings] == [1]


class At(TrainerCallback):
    """Has a card in force during one step."""

    def __init__(self, step: int, card: VirtualCard) -> None:
        self.step, self.card = step, card

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.card.__enter__()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.card.__exit__(None, None, None)


def test_a_guarded_run_is_recorded_by_itself_and_logged_as_a_plain_one(tmp_path: Path) -> None:
    heard = Heard()
    trainer = make(tmp_path, heard, max_steps=3)
    before = list(trainer.callback_handler.callbacks)
    with VirtualCard("1GiB") as card:
        card.track(trainer.model)
        faults = VirtualCard(fail_at=60)
        trainer.add_callback(At(2, faults))
        report = oomguard.fit(trainer, ladder=Ladder(oomguard.SplitBatch()))
    assert [recovery.rung for recovery in report.recoveries] == ["SplitBatch"]
    rows = Series.load(tmp_path / FILE_NAME).readings
    assert [row.step for row in rows] == [1, 2, 3]
    assert [row.batch_tokens is None for row in rows] == [False, True, False]
    assert not any(vram(line) for line in heard.lines + trainer.state.log_history)
    assert trainer.callback_handler.callbacks[: len(before)] == before
    assert not any(isinstance(c, VRAMRecorder) for c in trainer.callback_handler.callbacks)


def test_the_guard_takes_the_reporter_that_is_there_and_writes_what_a_failed_run_read(
    tmp_path: Path,
) -> None:
    reporter = oomguard.VRAMReporter()
    trainer = make(tmp_path, reporter, Fails(2))
    with pytest.raises(ValueError, match="own"):
        oomguard.fit(trainer)
    assert [row.step for row in Series.load(tmp_path / FILE_NAME).readings] == [1, 2]
    assert reporter.guarded is None
    recorders = [c for c in trainer.callback_handler.callbacks if isinstance(c, VRAMRecorder)]
    assert recorders == [reporter]
    assert any(vram(line) for line in trainer.state.log_history)
