"""Short trainings of a tiny model on a small virtual card, with a `LeakDetector` watching."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from oomguard import LeakDetector
from oomguard.testing import VirtualCard
from tests.tiny import ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import TrainerCallback

    from oomguard.watch.findings import Finding

VOCABULARY, WIDTH, LENGTH, ROWS = 64, 128, 64, 8
STEPS = 200
CAPACITY_BYTES = 96 * 2**20


class Tiny(nn.Module):
    """A language model of one layer. Its hidden states are 256 KiB a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.keep(torch.relu(self.layer(self.embedding(input_ids))))
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "hidden": hidden}

    def keep(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states, for models that keep something of them."""
        return hidden


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random tokens; row n has `lengths[n]` of them."""

    def __init__(self, lengths: Sequence[int]) -> None:
        draw = torch.Generator().manual_seed(0)
        longest = torch.randint(0, VOCABULARY, (max(lengths),), generator=draw)
        self.rows = [longest[:length] for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class InOrder(Trainer):
    """Takes the rows as they come, and hands what the model returns to `keep`."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(cast("Rows", self.train_dataset))

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **how: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **how)
        self.keep(loss, outputs)
        return (loss, outputs) if return_outputs else loss

    def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
        """For trainers that keep something of a step."""


class Node:
    """Refers to itself, so that only the collector frees what it holds."""

    def __init__(self, activation: torch.Tensor) -> None:
        self.activation = activation
        self.itself = self


class MakesCycles(InOrder):
    """Leaves a reference cycle behind at every step."""

    def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
        Node(outputs["hidden"].detach())


@contextmanager
def without_collector() -> Iterator[None]:
    """Garbage stays until it is asked for, as in scripts that collect by themselves."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def evaluated(folder: Path, metrics: Callable[..., torch.Tensor]) -> InOrder:
    """A trainer that evaluates every ten steps and hands the logits to `metrics`."""
    more = {"preprocess_logits_for_metrics": metrics, "compute_metrics": lambda _: {}}
    return trainer_of(folder, eval_rows=64, more=more, eval_strategy="steps", eval_steps=10)


def trainer_of(
    folder: Path,
    *,
    model: nn.Module | None = None,
    trainer_class: type[InOrder] = InOrder,
    callbacks: Sequence[TrainerCallback] = (),
    lengths: Sequence[int] = (LENGTH,) * (STEPS * ROWS),
    eval_rows: int = ROWS,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> InOrder:
    """A trainer of `STEPS` steps; `more` goes to its class, `changes` to its arguments."""
    set_seed(0)
    arguments = {
        **ARGUMENTS,
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "logging_steps": 50,
        **changes,
    }
    return trainer_class(
        model=Tiny() if model is None else model,
        args=TrainingArguments(**arguments),
        train_dataset=Rows(lengths),
        eval_dataset=Rows((LENGTH,) * eval_rows),
        callbacks=list(callbacks),
        **(more or {}),
    )


def watched(
    make: Callable[[], Trainer], *, capacity_bytes: int = CAPACITY_BYTES, trainings: int = 1
) -> list[Finding]:
    """What the detector finds in trainings on one card."""
    gc.collect()
    with VirtualCard(capacity_bytes) as card:
        for _ in range(trainings):
            detector = LeakDetector()
            trainer = make()
            card.track(trainer.model)  # type: ignore[arg-type]
            trainer.add_callback(detector)
            trainer.train()
    return detector.findings
