"""What memory does without leaking, each in a real training: the detector has nothing to say."""

from __future__ import annotations

import gc
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.leaks.runs import (
    LENGTH,
    ROWS,
    STEPS,
    WIDTH,
    InOrder,
    MakesCycles,
    Tiny,
    evaluated,
    trainer_of,
    watched,
    without_collector,
)

if TYPE_CHECKING:
    from pathlib import Path


class LastHidden(Tiny):
    """Keeps what it made of the last batch: what is alive depends on the batch."""

    def keep(self, hidden: torch.Tensor) -> torch.Tensor:
        self.last = hidden.detach().repeat(1, 1, 8)
        return hidden


def test_batches_that_grow_longer_and_longer_are_no_leak(tmp_path: Path) -> None:
    lengths = [16 + 400 * step // STEPS for step in range(STEPS) for _ in range(ROWS)]
    assert (
        watched(
            lambda: trainer_of(tmp_path, model=LastHidden(), lengths=lengths),
            capacity_bytes=40 * 2**20,
        )
        == []
    )


def test_a_cache_with_a_bound_is_no_leak(tmp_path: Path) -> None:
    class Bounded(InOrder):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            kept = self.__dict__.setdefault("kept", deque(maxlen=60))
            kept.append(outputs["hidden"].detach())

    assert watched(lambda: trainer_of(tmp_path, trainer_class=Bounded)) == []


def test_cycles_that_are_collected_now_and_then_are_no_leak(tmp_path: Path) -> None:
    class Collects(MakesCycles):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            super().keep(loss, outputs)
            if self.state.global_step % 25 == 0:
                gc.collect(1)

    with without_collector():
        assert watched(lambda: trainer_of(tmp_path, trainer_class=Collects)) == []


@pytest.mark.slow
def test_optimizer_state_that_comes_with_the_first_gradient_is_no_leak(tmp_path: Path) -> None:
    class Experts(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(40))
            self.calls = 0

        def keep(self, hidden: torch.Tensor) -> torch.Tensor:
            expert = self.experts[self.calls * len(self.experts) // (STEPS + 1)]
            self.calls += 1
            used: torch.Tensor = expert(hidden)[..., :WIDTH]
            return hidden + used

    found = watched(lambda: trainer_of(tmp_path, model=Experts()), capacity_bytes=56 * 2**20)
    assert found == []


@pytest.mark.slow
def test_what_a_profiler_window_keeps_is_no_leak(tmp_path: Path) -> None:
    class Window(InOrder):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            kept = self.__dict__.setdefault("kept", [])
            if 60 <= self.state.global_step < 110:
                kept.append(outputs["hidden"].detach())
            elif self.state.global_step == 110:
                kept.clear()

    assert watched(lambda: trainer_of(tmp_path, trainer_class=Window)) == []


@pytest.mark.slow
def test_an_evaluation_every_few_steps_is_no_leak(tmp_path: Path) -> None:
    class Metrics:
        last: Any = None

        def __call__(self, outputs: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
            self.last = outputs[0]
            return outputs[0].argmax(-1)

    assert watched(lambda: evaluated(tmp_path, Metrics())) == []


@pytest.mark.slow
def test_a_history_of_figures_is_no_leak(tmp_path: Path) -> None:
    class Logs(InOrder):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            self.__dict__.setdefault("history", []).append(
                {"loss": loss.item(), "last": loss.detach(), "ids": list(range(100))}
            )

    assert watched(lambda: trainer_of(tmp_path, trainer_class=Logs)) == []


@pytest.mark.slow
def test_gradient_accumulation_is_no_leak(tmp_path: Path) -> None:
    def make() -> InOrder:
        return trainer_of(
            tmp_path,
            model=LastHidden(),
            gradient_accumulation_steps=4,
            per_device_train_batch_size=ROWS // 4,
        )

    assert watched(make) == []


@pytest.mark.slow
def test_a_warm_up_that_dies_away_is_no_leak(tmp_path: Path) -> None:
    class Positions(Tiny):
        """Caches what each batch length needs, as compiled graphs and masks are cached."""

        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[int, torch.Tensor] = {}

        def keep(self, hidden: torch.Tensor) -> torch.Tensor:
            length = hidden.shape[1]
            if length not in self.cache:
                self.cache[length] = torch.ones(length, 16 * length)
            return hidden

    draw = random.Random(0)  # noqa: S311 - lengths
    lengths = [
        length
        for _ in range(STEPS)
        for length in [draw.randint(16, 2 * LENGTH)]
        for _ in range(ROWS)
    ]
    assert watched(lambda: trainer_of(tmp_path, model=Positions(), lengths=lengths)) == []


@pytest.mark.slow
def test_a_checkpoint_every_few_steps_is_no_leak(tmp_path: Path) -> None:
    assert (
        watched(
            lambda: trainer_of(
                tmp_path,
                model=LastHidden(),
                save_strategy="steps",
                save_steps=20,
                save_total_limit=1,
            )
        )
        == []
    )


@pytest.mark.slow
def test_a_buffer_of_the_longest_batch_so_far_is_no_leak(tmp_path: Path) -> None:
    class Buffer(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.scratch = torch.empty(0)

        def keep(self, hidden: torch.Tensor) -> torch.Tensor:
            if hidden.numel() > self.scratch.numel():
                self.scratch = torch.empty(8, hidden.numel())
            return hidden

    draw = random.Random(1)  # noqa: S311 - lengths
    lengths = [
        length
        for step in range(STEPS)
        for length in [draw.randint(16, 32 + step)]
        for _ in range(ROWS)
    ]
    assert watched(lambda: trainer_of(tmp_path, model=Buffer(), lengths=lengths)) == []


@pytest.mark.slow
def test_copies_of_the_weights_made_now_and_then_are_no_leak(tmp_path: Path) -> None:
    class Averages(TrainerCallback):
        """Keeps the weights of two moments, such as an average of them."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in {50, 120}:
                copied = [w.detach().repeat(20, 1) for w in kwargs["model"].parameters()]
                self.__dict__.setdefault("kept", []).append(copied)

    assert watched(lambda: trainer_of(tmp_path, callbacks=[Averages()])) == []
