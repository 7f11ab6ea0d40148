"""The callback around the detector: what it does with a finding, and what it leaves alone."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from transformers import TrainerCallback

import oomguard
from oomguard.memory import simulated
from oomguard.testing import VirtualCard
from oomguard.watch.findings import FILE_NAME, Finding, load_findings, save_findings
from tests.failures import unreadable_card
from tests.leaks.runs import CAPACITY_BYTES, InOrder, Tiny, trainer_of
from tests.tiny import largest_difference, weights

ALARM = 176  # where a leak of 256 KiB a step on this card has been looked into


class Leaks(InOrder):
    """Keeps the hidden states of every step up to `until`, then lets go of all of them."""

    until = 10**6
    copies = 1

    def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
        kept = self.__dict__.setdefault("hidden", [])
        kept += [outputs["hidden"].detach().clone() for _ in range(self.copies)]
        if self.state.global_step >= self.until:
            kept.clear()


class Alarmed(NamedTuple):
    """What is left of that training."""

    folder: Path
    detector: oomguard.LeakDetector
    trainer: InOrder
    told: list[str]
    rng_state: torch.Tensor


def leaky(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> InOrder:
    return trainer_of(folder, trainer_class=Leaks, callbacks=callbacks, **changes)


def train(trainer: InOrder, **how: Any) -> None:
    with VirtualCard(CAPACITY_BYTES) as card:
        card.track(trainer.model)  # type: ignore[arg-type]
        trainer.train(**how)


@pytest.fixture(scope="module")
def alarmed(tmp_path_factory: pytest.TempPathFactory) -> Alarmed:
    """A training in which the detector raised an alarm."""
    folder, detector = tmp_path_factory.mktemp("alarmed"), oomguard.LeakDetector()
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("oomguard")
    logger.addHandler(handler)
    try:
        trainer = leaky(folder, detector)
        train(trainer)
    finally:
        logger.removeHandler(handler)
    return Alarmed(folder, detector, trainer, told, torch.get_rng_state())


def test_training_comes_out_as_without_it_although_it_raised_an_alarm(
    alarmed: Alarmed, tmp_path: Path
) -> None:
    twin = leaky(tmp_path)
    train(twin)
    assert torch.equal(alarmed.rng_state, torch.get_rng_state())
    assert largest_difference(weights(alarmed.trainer), weights(twin)) == 0
    assert lines(alarmed.trainer) == lines(twin)
    assert not alarmed.trainer.model._forward_pre_hooks  # type: ignore[union-attr]


def lines(trainer: InOrder) -> list[dict[str, Any]]:
    """The log without times."""
    return [
        {name: value for name, value in line.items() if not re.search("runtime|per_second", name)}
        for line in trainer.state.log_history
    ]


def test_a_finding_is_told_once_and_is_in_the_file(alarmed: Alarmed) -> None:
    (finding,) = alarmed.detector.findings
    assert (finding.kind, finding.step) == ("leak", ALARM)
    assert alarmed.told == [finding.message]
    assert load_findings(alarmed.folder / FILE_NAME) == [finding]


def test_the_file_says_that_nothing_was_found(tmp_path: Path) -> None:
    save_findings([Finding(kind="leak", message="of another run", step=3)], tmp_path / FILE_NAME)
    train(trainer_of(tmp_path, callbacks=[oomguard.LeakDetector()], max_steps=2))
    assert json.loads((tmp_path / FILE_NAME).read_text()) == []


def test_a_run_with_a_leak_can_be_stopped(tmp_path: Path) -> None:
    trainer = leaky(tmp_path, oomguard.LeakDetector(action="stop"))
    train(trainer)
    assert trainer.state.global_step == ALARM


@pytest.mark.slow
def test_a_run_with_a_leak_can_be_saved(tmp_path: Path) -> None:
    trainer = leaky(tmp_path, oomguard.LeakDetector(action="checkpoint"))
    train(trainer)
    assert trainer.state.global_step > ALARM
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{ALARM}"]


def test_another_action_is_refused() -> None:
    with pytest.raises(oomguard.ConfigurationError, match="'warn', 'stop', 'checkpoint'"):
        oomguard.LeakDetector(action="cry")  # type: ignore[arg-type]


def test_a_finding_is_taken_back_when_the_memory_is_given_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class LetsGo(Leaks):
        until = ALARM + 10

    detector = oomguard.LeakDetector()
    with caplog.at_level(logging.INFO, "oomguard.watch"):
        train(trainer_of(tmp_path, trainer_class=LetsGo, callbacks=[detector], max_steps=260))
    assert [finding.withdrawn for finding in detector.findings] == [True]
    assert load_findings(tmp_path / FILE_NAME) == detector.findings
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_resumed_run_keeps_what_was_found_before_its_checkpoint(tmp_path: Path) -> None:
    train(trainer_of(tmp_path, save_strategy="steps", save_steps=4, max_steps=4))
    found = [Finding(kind="leak", message=f"at {step}", step=step) for step in (3, 5)]
    save_findings(found, tmp_path / FILE_NAME)
    detector = oomguard.LeakDetector()
    train(trainer_of(tmp_path, callbacks=[detector], max_steps=6), resume_from_checkpoint=True)
    assert detector.findings == found[:1]
    assert load_findings(tmp_path / FILE_NAME) == found[:1]


def test_what_fails_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).mkdir()
    trainer = trainer_of(tmp_path, callbacks=[oomguard.LeakDetector()], max_steps=4)
    with caplog.at_level(logging.WARNING, "oomguard"), unreadable_card():
        trainer.train()
    assert trainer.state.global_step == 4
    told = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert told == [
        f"LeakDetector does not write {FILE_NAME}",
        "LeakDetector does not watch all of this run's memory",
    ]


class Counting:
    """A card that counts how often it is asked what lives on it."""

    capacity_bytes = None
    peak_bytes = 0

    def __init__(self) -> None:
        self.reads = 0

    @property
    def allocated_bytes(self) -> int:
        self.reads += 1
        return 0

    def take_peak(self) -> int:
        return 0


class Notes(TrainerCallback):
    """Keeps how often a card was read by the end of each step."""

    def __init__(self, card: Counting) -> None:
        self.card = card
        self.reads: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.reads.append(self.card.reads)


@pytest.mark.parametrize("reporters", [[], [oomguard.VRAMReporter()]], ids=["alone", "reported"])
def test_memory_is_read_once_a_step_though_the_reporter_watches_too(
    tmp_path: Path, reporters: list[TrainerCallback]
) -> None:
    card = Counting()
    notes = Notes(card)
    callbacks = [oomguard.LeakDetector(), notes, *reporters]
    trainer = trainer_of(tmp_path, callbacks=callbacks, max_steps=7)
    simulated.enter(card)
    try:
        trainer.train()
    finally:
        simulated.leave(card)
    # After steps 1, 2 and 4 the reporter asks what the memory consists of.
    assert [later - earlier for earlier, later in pairwise(notes.reads[4:])] == [1, 1]


def test_an_alarm_is_told_although_its_holder_cannot_be_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(list[torch.Tensor]):
        def __iter__(self) -> Any:
            msg = "not now"
            raise RuntimeError(msg)

    class Keeps(InOrder):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            self.__dict__.setdefault("kept", Odd()).append(outputs["hidden"].detach())

    detector = oomguard.LeakDetector()
    with caplog.at_level(logging.WARNING, "oomguard"):
        train(trainer_of(tmp_path, trainer_class=Keeps, callbacks=[detector]))
    (finding,) = detector.findings
    assert (finding.kind, finding.holder) == ("leak", None)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "LeakDetector does not say what holds the memory",
        finding.message.partition(":")[0],
    ]


def test_a_recovery_of_the_guard_is_no_leak(tmp_path: Path) -> None:
    detector = oomguard.LeakDetector()
    trainer = trainer_of(tmp_path, model=Tiny(), callbacks=[detector], max_steps=40)
    with VirtualCard(fail_at=[500, 900]):
        report = oomguard.fit(trainer)
    assert len(report.recoveries) == 2
    assert detector.findings == []


def one_token_less(plan: oomguard.Plan, event: oomguard.OOMEvent) -> oomguard.Plan:
    """A rung that can always be taken once more."""
    return replace(plan, max_pass_tokens=(plan.max_pass_tokens or 512) - 1)


@pytest.mark.slow
def test_what_every_recovery_leaves_is_put_down_to_the_recoveries(tmp_path: Path) -> None:
    class Failures:
        kept: ClassVar[list[torch.Tensor]] = []

    class Notes(InOrder):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            try:
                return super().training_step(*args, **kwargs)
            except torch.OutOfMemoryError:
                Failures.kept.append(torch.ones(512, 1024))
                raise

    detector = oomguard.LeakDetector()
    trainer = trainer_of(tmp_path, trainer_class=Notes, callbacks=[detector])
    with VirtualCard(64 * 2**20, fail_at=range(1000, 9000, 700)):
        report = oomguard.fit(trainer, ladder=oomguard.Ladder(one_token_less))
    assert len(report.recoveries) > 8
    (finding,) = detector.findings
    assert finding.phase == "recovery"
    assert str(finding.holder).startswith("Failures.kept > list[")
    assert "with every recovery" in finding.message


def test_without_a_card_it_watches_the_host(tmp_path: Path) -> None:
    detector = oomguard.LeakDetector()
    trainer_of(tmp_path, callbacks=[detector], max_steps=70).train()
    assert detector.findings == []


@pytest.mark.slow
def test_a_leak_on_the_host_is_named(tmp_path: Path) -> None:
    # A process of its own: in this one malloc has much that other tests gave back.
    script = """
import sys
from pathlib import Path
import oomguard
from tests.test_leak import Leaks, leaky
Leaks.copies = 3
leaky(Path(sys.argv[1]), oomguard.LeakDetector(), max_steps=1100).train()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])  # noqa: S603 - our own
    (finding,) = load_findings(tmp_path / FILE_NAME)
    assert finding.message.startswith("Host memory grows by ")
    assert str(finding.holder).startswith("Leaks.hidden > list[")
