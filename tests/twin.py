"""Twin runs: one training that runs out of memory, and the same one that does not."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import datasets
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

import oomguard
from oomguard.ladder import Ladder
from oomguard.testing import VirtualCard
from tests import tiny

if TYPE_CHECKING:
    from oomguard.report import Report

Build = Callable[[Path], Trainer]
"""Makes a trainer that writes to the folder."""
Faults = Mapping[tuple[str, int], int]
"""Which allocation fails: in `("forward", n)` or `("backward", n)` of the n-th call of
`training_step`, or in `("optimizer", n)` of the n-th optimizer step; all counted from 1."""

SMALL: dict[str, Any] = {**tiny.ARGUMENTS, "max_steps": 2, "learning_rate": 1e-4}
"""Two optimizer steps of 2 x 4 rows. At larger learning rates Adam amplifies float order:
weights of a full fine-tune then differ by up to 0.004 times the rate."""

CHECKPOINT = Ladder(oomguard.CheckpointActivations())
SPLIT = Ladder(oomguard.SplitBatch())
EXACT: dict[str, float] = {}
"""No quantity may differ at all."""
CLOSE = dict.fromkeys(
    ("weights", "moments", "loss", "train_loss", "grad_norm", "mean_token_accuracy", "entropy"),
    1e-6,
)
"""Float order: largest difference of weights and moments, of logged values relative to above 1."""

_CLOCK = ("_runtime", "_per_second", "step_time")

datasets.disable_progress_bars()
# Every recovery collects garbage. What the imports made stays anyway, and is a second a time.
gc.freeze()


@dataclass
class Pass:
    """One completed call of the trainer's own `training_step`; its longest row or document."""

    step: int
    shape: tuple[int, ...]
    longest: int
    targets: int


@dataclass
class Run:
    """What a training left behind, and what could be seen of it from outside."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    logs: list[dict[str, float]]
    order: list[Any]
    events: list[tuple[Any, ...]]
    passes: list[Pass]
    rng: torch.Tensor
    report: Report | None

    @property
    def rungs(self) -> list[str | None]:
        """The rungs that were taken, in order."""
        return [recovery.rung for recovery in self.recoveries]

    @property
    def recoveries(self) -> list[Any]:
        """The recoveries that were reported."""
        return [] if self.report is None else self.report.recoveries


def short_texts(rows: int = 20, length: int = 240) -> Dataset:
    """Texts of up to about 100 tokens, most of them shorter than their batch is wide."""
    return Dataset.from_dict({"text": [text[:length] for text in tiny.texts()[:rows]]})


def sft(folder: Path, **changes: Any) -> Trainer:
    """An SFTTrainer with LoRA; `changes` as in `tiny.sft_trainer`."""
    return tiny.sft_trainer(folder, **{**SMALL, "dataset": short_texts(), **changes})


def run(
    build: Build,
    ladder: Ladder | str | None = None,
    faults: Faults | None = None,
    *,
    folder: Path | None = None,
    card: VirtualCard | None = None,
    front: tuple[type[Trainer], ...] = (),
    earlier: int = 0,
    **train_arguments: Any,
) -> Run:
    """Train: plainly without a ladder, else under the guard, which must meet every fault.

    Args:
        build: Makes the trainer.
        ladder: The guard's ladder; `None` calls `trainer.train()` without a guard.
        faults: Which allocations fail.
        folder: Where the trainer writes to; a temporary folder if `None`.
        card: Entered around the whole training.
        front: Classes to put in front of the trainer's, as another remedy would.
        earlier: Recoveries of the run that this one resumes.
        **train_arguments: Go to `trainer.train`.
    """
    with TemporaryDirectory() as temporary, ExitStack() as cards:
        trainer = build(folder or Path(temporary))
        log = _Log(dict(faults or {}), cards)
        _record(trainer, log, front)
        if card is not None:
            cards.enter_context(card)
        report = None
        if ladder is None:
            trainer.train(**train_arguments)
        else:
            report = oomguard.fit(trainer, ladder=ladder, **train_arguments)
            met = sorted(recovery.event.phase for recovery in report.recoveries[earlier:])
            assert card is not None or met == sorted(phase for phase, _ in faults or {})
    return Run(
        weights={name: p.detach().clone() for name, p in _trained(trainer)},
        moments=_moments(trainer),
        logs=[
            {key: value for key, value in line.items() if not key.endswith(_CLOCK)}
            for line in trainer.state.log_history
        ],
        order=log.order,
        events=log.events,
        passes=log.passes,
        rng=torch.get_rng_state(),
        report=report,
    )


@cache
def twin(build: Build) -> Run:
    """The same training without a guard and without an error, made once in a session."""
    return run(build)


def differences(one: Run, other: Run) -> dict[str, float]:
    """The largest difference of every quantity that is not equal; infinite where incomparable."""
    found = {
        "weights": _largest(one.weights, other.weights),
        "moments": _largest(one.moments, other.moments),
        "order": 0.0 if one.order == other.order else math.inf,
        "events": 0.0 if one.events == other.events else math.inf,
        "rng": 0.0 if torch.equal(one.rng, other.rng) else math.inf,
    }
    if [line.keys() for line in one.logs] != [line.keys() for line in other.logs]:
        return found | {"logs": math.inf}
    for line, twin in zip(one.logs, other.logs, strict=True):
        for key, value in line.items():
            off = abs(value - twin[key]) / max(1.0, abs(twin[key]))
            if not off <= found.get(key, 0.0):  # no number is a difference too
                found[key] = off
    return {key: value for key, value in found.items() if value != 0}


def beyond(found: dict[str, float], allowed: Mapping[str, float]) -> dict[str, float]:
    """The differences that are larger than allowed."""
    return {key: value for key, value in found.items() if not value <= allowed.get(key, 0.0)}


def assert_same(one: Run, other: Run, allowed: Mapping[str, float]) -> None:
    """Fail with the quantities that differ by more than `allowed`."""
    found = differences(one, other)
    assert not beyond(found, allowed), found
    assert len(other.logs) > 1, "the twin has logged nothing"


def _largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    if one.keys() != other.keys() or not one:
        return math.inf
    return float(torch.stack([(one[name] - other[name]).abs().max() for name in one]).max())


def _trained(trainer: Trainer) -> list[tuple[str, Any]]:
    model: Any = trainer.model
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    optimizer: Any = trainer.optimizer
    return {
        f"{index}.{key}": value.detach().clone().float()
        for index, (_, state) in enumerate(optimizer.state.items())
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@dataclass
class _Log:
    """The faults still to come, and what has been seen so far.

    Not kept on the trainer itself, whose numbers and lists are put back after an out-of-memory.
    """

    faults: dict[tuple[str, int], int]
    cards: ExitStack
    calls: int = 0
    order: list[Any] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)

    def arm(self, phase: str, number: int, cards: ExitStack) -> None:
        """From here on a card that fails as planned, until `cards` is closed."""
        fail_at = self.faults.get((phase, number))
        if fail_at is not None:
            cards.enter_context(VirtualCard(fail_at=fail_at))


class _Recording(Trainer):
    """Stands in front of a trainer's own class; below the guard, like a user's own subclass."""

    _log: _Log
    _step_cards: ExitStack

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self._log.calls += 1
        with ExitStack() as self._step_cards:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if "input_ids" not in inputs:  # samples what it trains on: see compute_loss
            return loss
        shape, positions = tuple(inputs["input_ids"].shape), inputs.get("position_ids")
        longest = shape[1] if positions is None else int(positions.max()) + 1
        labels = inputs.get("labels")
        targets = 0 if labels is None else int(labels[..., 1:].ne(-100).sum())
        self._log.passes.append(Pass(self.state.global_step + 1, shape, longest, targets))
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # no training: the guard measures, or the trainer evaluates
            return super().compute_loss(*args, **kwargs)
        with ExitStack() as cards:
            self._log.arm("forward", self._log.calls, cards)
            loss = super().compute_loss(*args, **kwargs)
        if "completion_ids" in args[1]:
            shape, mask = tuple(args[1]["completion_ids"].shape), args[1]["completion_mask"]
            made = Pass(self.state.global_step + 1, shape, shape[1], int(mask.sum()))
            self._log.passes.append(made)
        self._log.arm("backward", self._log.calls, self._step_cards)
        return loss


class _Watching(TrainerCallback):
    """Writes down every event that the Trainer announces."""

    def __init__(self, log: _Log) -> None:
        self._log = log
        self._cards = ExitStack()

    def __getattribute__(self, name: str) -> Any:
        return partial(self.see, name) if name.startswith("on_") else super().__getattribute__(name)

    def see(self, name: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Any event."""
        self._log.events.append((name, state.global_step, state.epoch))
        if name == "on_pre_optimizer_step":
            self._cards = self._log.cards.enter_context(ExitStack())
            self._log.arm("optimizer", state.global_step + 1, self._cards)
        elif name == "on_optimizer_step":
            self._cards.close()


def _record(trainer: Any, log: _Log, front: tuple[type[Trainer], ...]) -> None:
    own, collate = type(trainer), trainer.data_collator

    def recorded(rows: list[Any]) -> Any:
        batch = collate(rows)
        sampled = isinstance(batch, list)  # prompts
        order = [row["prompt"] for row in batch] if sampled else batch["input_ids"].tolist()
        log.order.append(order)
        return batch

    trainer.data_collator = recorded
    trainer.__class__ = type(own.__name__, (*front, _Recording, own), {})
    trainer._log = log
    trainer.add_callback(_Watching(log))
