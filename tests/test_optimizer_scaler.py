"""A step under a gradient scaler is whole too."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from oomguard import LadderExhaustedError
from oomguard.optimizer_step import AtomicStep
from oomguard.testing import VirtualCard
from tests import tiny
from tests.allocations import LoggingCard
from tests.test_optimizer_step import (
    OPTIMIZERS,
    Trained,
    assert_equal,
    forgive,
    give_up,
)
from tests.twin import EXACT, assert_same, run

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.oom import OOMFacts

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups], Optimizer]


SCALED = ["adamw fused", "adamw foreach", "adamw one by one", "sgd with momentum"]


def train_scaled(
    make: MakeOptimizer,
    card: VirtualCard,
    at: int,
    *,
    overflows: int = 0,
    make_room: Callable[[OOMFacts, int], None] = forgive,
) -> tuple[Trained, torch.amp.GradScaler]:
    """As `train`, under a scaler; the first gradients overflow, so that their steps are skipped."""
    torch.manual_seed(0)
    weights = [Parameter(torch.randn(24, 16)) for _ in range(3)]
    optimizer = make([{"params": weights[:2]}, {"params": weights[2:]}])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    atomic_step = AtomicStep(make_room, lambda _: None)

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    for index in range(at + 2):
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in weights), torch.tensor(0.0))
        scaler.scale(loss * (torch.inf if index < overflows else 1)).backward()
        # The Trainer does so at every step, for the norm's sake if not to clip.
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        if index == at:
            with card:
                atomic_step(lambda: optimizer, step)
        else:
            atomic_step(lambda: optimizer, step)
    return Trained(weights, optimizer, card), scaler


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("overflows", [0, 1])
@pytest.mark.parametrize("name", SCALED)
def test_a_step_under_a_gradient_scaler_is_whole(name: str, overflows: int, at: int) -> None:
    fault_at = partial(train_scaled, OPTIMIZERS[name], at=at, overflows=overflows)
    unharmed, twin_scaler = fault_at(VirtualCard(fail_at=10**9))
    assert unharmed.card.allocations or overflows > at  # a step that is skipped
    for k in range(1, unharmed.card.allocations + 1):
        faulted, scaler = fault_at(VirtualCard(fail_at=k))
        assert_equal(faulted.content(), unharmed.content())
        assert scaler.state_dict() == twin_scaler.state_dict()


def test_state_is_not_made_on_the_host_after_a_step_that_the_scaler_skipped() -> None:
    make = OPTIMIZERS["adamw one by one"]
    train_once = partial(train_scaled, make, at=1, overflows=1, make_room=give_up)
    needed = train_once(VirtualCard("1GiB"))[0].card.peak_bytes
    with pytest.raises(LadderExhaustedError):
        train_once(VirtualCard(needed // 2))


def fp16_trainer(skipped: bool, folder: Path) -> Any:
    """Mixed precision with a real scaler, put together as accelerate does on a GPU."""
    trainer: Any = tiny.sft_trainer(
        folder,
        dataset=tiny.text_dataset(8),
        per_device_train_batch_size=1,
        max_length=16,
        max_steps=2,
        max_grad_norm=0.05,
        fp16=True,
        optim="adamw_torch" if skipped else "adamw_torch_fused",
    )
    assert trainer.accelerator.mixed_precision == "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**127 if skipped else 2.0**10, backoff_factor=2.0**-117
    )
    return trainer


@pytest.mark.parametrize("skipped", [False, True])
def test_unscaling_clipping_and_stepping_of_a_trainer_survive_a_failure(skipped: bool) -> None:
    build = partial(fp16_trainer, skipped)
    card = LoggingCard(build)
    twin = run(card.build, "default", card=card)
    assert not twin.recoveries
    assert math.isfinite(twin.logs[0]["grad_norm"]) != skipped
    assert math.isfinite(twin.logs[1]["grad_norm"])
    ends = card.numbers("clip", "optimizer")
    for k in (ends[0], *ends[3::17], ends[-1]):
        faulted = run(build, "default", card=VirtualCard(fail_at=k))
        assert_same(faulted, twin, EXACT)
        assert [recovery.event.phase for recovery in faulted.recoveries] == [card.places[k - 1][0]]
