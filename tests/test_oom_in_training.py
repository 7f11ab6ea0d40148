"""Errors during a training: which are made good, which pass, and what an interrupt leaves."""

from __future__ import annotations

import copy
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainerCallback, set_seed
from trl import SFTTrainer

import oomguard
from oomguard.retry import off_card
from oomguard.testing import VirtualCard
from tests import tiny
from tests.allocations import LoggingCard
from tests.oom_errors import OUT_OF_MEMORY

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.event import OOMEvent
    from oomguard.plan import Plan


class Faulty(SFTTrainer):
    """Raises what it is told to at the second step, before or after a part of its work."""

    def __init__(self, *args: Any, fault: BaseException | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault = fault

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.fault is not None and self.state.global_step == 1:
            fault, self.fault = self.fault, None
            raise fault
        return loss


def make(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "model": tiny.llama(num_hidden_layers=1),
        "dataset": tiny.text_dataset(12),
        "per_device_train_batch_size": 1,
        "max_length": 24,
        "max_steps": 3,
        "trainer_class": Faulty,
        "optim": "adamw_torch",
    }
    return tiny.sft_trainer(folder, **{**settings, **changes})


NOT_OURS: list[BaseException] = [
    ValueError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    KeyError("labels"),
    KeyboardInterrupt(),
    SystemExit(3),
]


@pytest.mark.parametrize("fault", NOT_OURS, ids=lambda fault: type(fault).__name__)
def test_errors_that_are_no_out_of_memory_pass_untouched(
    fault: BaseException, tmp_path: Path
) -> None:
    fault = copy.copy(fault)
    fault.__cause__ = cause = OverflowError("deep inside")
    trainer = make(tmp_path, trainer_arguments={"fault": fault})
    guard = oomguard.Guard(trainer)
    with pytest.raises(type(fault)) as raised, guard:
        trainer.train()
    assert raised.value is fault
    assert fault.__cause__ is cause
    assert "compute_loss" in [entry.name for entry in raised.traceback]
    assert trainer.__class__ is Faulty
    assert not guard.report.recoveries
    assert guard.report.status == "failed" if isinstance(fault, Exception) else "interrupted"
    assert guard.report.error == f"{type(fault).__name__}: {fault}"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = make(tmp_path_factory.mktemp("twin"))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "name", sorted(OUT_OF_MEMORY.keys() - {"cpu on windows", "nccl's own", "hip", "hip driver"})
)
def test_a_step_is_made_again_after_any_of_them(name: str, twin: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path, trainer_arguments={"fault": copy.copy(OUT_OF_MEMORY[name])})
    (recovery,) = oomguard.fit(trainer).recoveries
    assert recovery.event.message
    assert tiny.largest_difference(tiny.weights(twin), tiny.weights(trainer)) == 0


class LastWeights(TrainerCallback):
    """Keeps the weights of the last complete step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.states: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with off_card():
            self.weights = [p.detach().clone() for p in kwargs["model"].parameters()]
            self.states = copy.deepcopy(list(kwargs["optimizer"].state.values()))


class InterruptBeforeStep(TrainerCallback):
    """Ctrl-C between two steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.step = 0
            raise KeyboardInterrupt


PLACES = ["rung", "lever", "garbage collection"]


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


class Interrupted(oomguard.Rung):
    fidelity = oomguard.Fidelity.EXACT
    relieves_optimizer = True

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Phase and step of every allocation."""
    card = LoggingCard(make)
    trainer = card.build(tmp_path_factory.mktemp("places"))
    with card:
        oomguard.fit(trainer)
    return card.places


@pytest.mark.parametrize(
    ("phase", "step", "place"),
    [
        *product(["fetch", "forward", "backward"], [2], PLACES),
        *product(["optimizer"], [1], ["rung", "garbage collection"]),
        ("clip", 2, "garbage collection"),
    ],
)
def test_an_interrupt_during_a_recovery_leaves_the_last_complete_step(
    phase: str,
    step: int,
    place: str,
    places: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [number for number, where in enumerate(places, 1) if where == (phase, step)]
    card = VirtualCard(fail_at=found[len(found) // 2])
    trainer, kept = make(tmp_path), LastWeights()
    untrained = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.add_callback(kept)
    ladder = oomguard.Ladder(Interrupted() if place == "rung" else oomguard.CheckpointActivations())
    guard = oomguard.Guard(trainer, ladder=ladder)
    if place == "lever":
        monkeypatch.setattr("oomguard.levers.activations.enable", interrupt)
    elif place == "garbage collection":
        monkeypatch.setattr("oomguard.memory.device.gc", SimpleNamespace(collect=interrupt))
    with pytest.raises(KeyboardInterrupt), card, guard:
        trainer.train()
    monkeypatch.undo()
    left: Any = type(trainer)
    assert left is Faulty
    assert (guard.report.status, guard.report.error) == ("interrupted", "KeyboardInterrupt: ")
    weights = [p.detach() for p in trainer.model.parameters()]
    torch.testing.assert_close(weights, kept.weights or untrained, rtol=0, atol=0)
    states = [state for state in trainer.optimizer.state.values() if state]
    torch.testing.assert_close(states, kept.states, rtol=0, atol=0)
    assert trainer.state.global_step == step - 1

    # Both begin once more, one of them after a recovery that was interrupted.
    plain = make(tmp_path)
    plain.add_callback(InterruptBeforeStep(step))
    with pytest.raises(KeyboardInterrupt):
        plain.train()
    set_seed(5)
    plain.train()
    set_seed(5)
    assert oomguard.fit(trainer).status == "finished"
    assert tiny.largest_difference(tiny.weights(plain), tiny.weights(trainer)) == 0


class Broken(oomguard.Rung):
    fidelity = oomguard.Fidelity.EXACT
    relieves_optimizer = True

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan:
        message = "this rung has a bug"
        raise ZeroDivisionError(message)


@pytest.mark.parametrize("rung", [Interrupted(), Broken()], ids=["interrupt", "error"])
def test_an_error_during_a_recovery_leaves_no_later_step_half_done(
    rung: oomguard.Rung, places: list[tuple[str, int]], tmp_path: Path
) -> None:
    plain, kept = make(tmp_path, max_steps=2, lr_scheduler_type="constant"), LastWeights()
    plain.add_callback(kept)
    plain.train()
    found = [number for number, where in enumerate(places, 1) if where == ("optimizer", 2)]
    trainer = make(tmp_path, lr_scheduler_type="constant")
    error = KeyboardInterrupt if isinstance(rung, Interrupted) else ZeroDivisionError
    with pytest.raises(error), VirtualCard(fail_at=found[len(found) // 2]):
        oomguard.fit(trainer, ladder=oomguard.Ladder(rung))
    weights = [p.detach() for p in trainer.model.parameters()]
    torch.testing.assert_close(weights, kept.weights, rtol=0, atol=0)
    states = list(trainer.optimizer.state.values())
    torch.testing.assert_close(states, kept.states, rtol=0, atol=0)
