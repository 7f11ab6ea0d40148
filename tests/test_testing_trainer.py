"""A real Trainer on a `VirtualCard`."""

from __future__ import annotations

import gc
import traceback
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from oomguard.testing import VirtualCard

if TYPE_CHECKING:
    from pathlib import Path

ROOMY_BYTES = 2**40


class Marks(TrainerCallback):
    """The number of allocations at the borders between the phases of the first step."""

    def __init__(self, card: VirtualCard, model: LlamaForCausalLM) -> None:
        self.at: dict[str, int] = {}
        self.card = card
        model.register_forward_pre_hook(lambda *_: self.mark("forward"))
        model.register_forward_hook(lambda *_: self.mark("backward"))

    def mark(self, phase: str) -> None:
        self.at.setdefault(phase, self.card.allocations)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.mark("optimizer")

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.mark("end")


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def tiny_trainer(model: LlamaForCausalLM, folder: Path) -> Trainer:
    ids = [[(7 * row + column) % 128 for column in range(24)] for row in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Where the phases begin in a run that meets no error."""
    model = tiny_model()
    trainer = tiny_trainer(model, tmp_path_factory.mktemp("clean"))
    with VirtualCard(ROOMY_BYTES) as card:
        callback = Marks(card, model)
        trainer.add_callback(callback)
        card.track(model)
        trainer.train()
    return callback.at


@pytest.mark.parametrize(
    ("phase", "following", "frame"),
    [
        ("forward", "backward", "modeling_llama.py:forward"),
        ("backward", "optimizer", "accelerator.py:backward"),
        ("optimizer", "end", "adam.py:step"),
    ],
)
def test_a_real_trainer_runs_out_of_memory_in_every_phase(
    phase: str, following: str, frame: str, marks: dict[str, int], tmp_path: Path
) -> None:
    model = tiny_model()
    trainer = tiny_trainer(model, tmp_path)
    failing = (marks[phase] + marks[following]) // 2
    assert marks[phase] < failing < marks[following]
    frames: list[str] = []
    with VirtualCard(fail_at=failing) as card:
        card.track(model)
        level = card.live_bytes
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            frames = [
                f"{entry.filename.replace(chr(92), '/').rpartition('/')[2]}:{entry.name}"
                for entry in traceback.extract_tb(error.__traceback__)
            ]
            assert card.live_bytes > level
        assert frame in frames
        assert card.allocations == failing
        del trainer
        model.zero_grad()
        gc.collect()
        assert card.live_bytes == level


def test_a_card_that_is_too_small_stops_a_real_trainer_and_a_larger_one_does_not(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    with VirtualCard(ROOMY_BYTES) as card:
        card.track(model)
        tiny_trainer(model, tmp_path).train()
    needed = card.peak_bytes
    for capacity_bytes, fits in ((needed, True), (needed - 512, False)):
        model = tiny_model()
        trainer = tiny_trainer(model, tmp_path)
        with VirtualCard(capacity_bytes) as card:
            card.track(model)
            with nullcontext() if fits else pytest.raises(torch.OutOfMemoryError):
                trainer.train()
        assert (trainer.state.global_step == 2) == fits
        assert card.peak_bytes <= capacity_bytes
