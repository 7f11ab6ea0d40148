"""What the guard relies on in upstream's training loop and its loader."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderShard
from transformers import Trainer
from trl import SFTTrainer

from oomguard.levers.metrics import _LOOP_OWNS
from oomguard.levers.tokens import counted_in_the_loop
from tests.kinds import sft
from tests.upstream import calls, source

if TYPE_CHECKING:
    from pathlib import Path

# Transformers 4 makes an epoch in the body of one method, and counts and clips there too.
LOOP = getattr(Trainer, "_run_epoch", None) or Trainer._inner_training_loop
CLIPPING = [
    getattr(Trainer, name)
    for name in ("_clip_grad_norm", "_get_grad_norm")
    if LOOP is not Trainer._inner_training_loop
]


def test_the_loop_makes_a_step_in_the_order_the_guard_relies_on() -> None:
    loop = [name.removeprefix("self.") for name in calls(LOOP)]
    # Input tokens are counted after a batch, or before it: see levers.tokens.
    before = ["accelerator.gather"] if counted_in_the_loop() else []
    after = [] if counted_in_the_loop() else ["_track_num_input_tokens"]
    clipping = [inner.__name__ for inner in CLIPPING] or ["accelerator.clip_grad_norm_"]
    order = [
        *("get_batch_samples", *before, "training_step", "floating_point_ops", *after),
        *(*clipping, "optimizer.step", "lr_scheduler.step"),
    ]
    assert [name for name in loop if name in order] == order, (
        f"Trainer.{LOOP.__name__}: a step is made in another order, or a part of it twice; "
        "compare it with hooks.GuardedTrainer and step.StepTransaction"
    )
    for inner in CLIPPING:
        assert "self.accelerator.clip_grad_norm_" in calls(inner), (
            f"Trainer.{inner.__name__} clips by another name: see Hooks.batches"
        )
    assert "self.accelerator.backward" in calls(Trainer.training_step), (
        "Trainer.training_step runs no backward: see StepTransaction.run"
    )


def test_the_loop_adds_to_one_plain_number_between_two_batches() -> None:
    assert _LOOP_OWNS == "current_flos"
    (inner,) = [
        node
        for node in ast.walk(source(LOOP))
        if isinstance(node, ast.For) and "batch_samples" in ast.unparse(node.iter)
    ]
    assigned = {
        ast.unparse(target)
        for node in ast.walk(inner)
        if isinstance(node, (ast.Assign, ast.AugAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if ast.unparse(target).startswith("self.")
    }
    expected = {"self.current_flos", "self.control", "self.state.global_step", "self.state.epoch"}
    one_body = LOOP is Trainer._inner_training_loop
    expected |= {"self.state.num_input_tokens_seen"} if one_body else {"self._tr_loss"}
    assert assigned == expected, (
        f"Trainer.{LOOP.__name__} assigns other attributes inside a step: _LOOP_OWNS in "
        "levers/metrics.py must name every plain number among them, or a replay takes it back"
    )


class Watched(SFTTrainer):
    """Remembers its plain numbers around every batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("seen", []).append(self.numbers())
        loss = super().training_step(*args, **kwargs)
        self.__dict__["seen"].append(self.numbers())
        return loss

    def numbers(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if isinstance(v, (int, float))}
        return {**plain, "lists": str(self._metrics)}


def test_only_that_number_moves_between_two_batches_of_a_real_step(tmp_path: Path) -> None:
    trainer = sft(tmp_path, trainer_class=Watched, max_steps=1, include_num_input_tokens_seen="all")
    trainer.train()
    _, after_first, before_second, _ = trainer.seen
    moved = {name for name in after_first if after_first[name] != before_second[name]}
    assert moved == {_LOOP_OWNS}, "see _LOOP_OWNS in levers/metrics.py"


def test_accelerates_loader_moves_batches_by_its_device_alone() -> None:
    rows = [torch.tensor([index]) for index in range(4)]
    loader = DataLoaderShard(rows, device=torch.device("meta"), batch_size=2, _non_blocking=True)
    assert [batch.device.type for batch in loader] == ["meta"] * 2
    loader.device = None
    assert [batch.tolist() for batch in loader] == [[[0], [1]], [[2], [3]]], (
        "DataLoaderShard moves batches by something else than .device: see Feed.attach"
    )
    assert loader._non_blocking is True, "DataLoaderShard._non_blocking: see Feed.attach"
    inner = vars(loader.base_dataloader)
    inner["collate_fn"], inner["dataset"] = len, rows[:3] + rows
    assert list(loader) == [2, 2], (
        "DataLoaderShard does not iterate the base_dataloader whose collate_fn Feed replaces"
    )
