"""Numbered rows, trainers that write down which of them they are given, and errors on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import BatchEncoding, Trainer, TrainingArguments

import oomguard
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from oomguard.report import Report

ROWS = 20
LADDER = oomguard.Ladder(oomguard.CheckpointActivations())


class Rows(Dataset[dict[str, list[int]]]):
    """Texts of different lengths; the first token of a row is its number."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        self.asked.append(index)
        text = tiny.tokenizer()(tiny.texts()[index])["input_ids"]
        return {"input_ids": [index, *text[: 6 + index % 5]]}


class RowsByBatch(Rows):
    def __getitems__(self, indices: list[int]) -> list[dict[str, list[int]]]:
        return [self[index] for index in indices]


class Stream(IterableDataset[dict[str, list[int]]]):
    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rows = Rows()
        return (rows[index] for index in range(ROWS))


def collate(rows: list[dict[str, list[int]]]) -> BatchEncoding:
    """Padded tensors, as collators of transformers return them."""
    batch = tiny.tokenizer().pad(rows, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


class Recording(Trainer):
    """Keeps what its steps are given. Nothing in these tests replays one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: tuple[dict[str, torch.Tensor], ...] = ()
        self.counts: tuple[int, ...] = ()

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self.seen += (dict(inputs),)
        self.counts += (int(num_items_in_batch),)
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def order(self) -> list[list[int]]:
        """The numbers of the rows, batch by batch."""
        return [batch["input_ids"][:, 0].tolist() for batch in self.seen]


def make(
    folder: Path,
    *,
    dataset: Any = None,
    collator: Any = collate,
    cls: type[Recording] = Recording,
    **changes: Any,
) -> Any:
    """Three steps of two batches of two rows: a bit more than an epoch of five steps in all."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "remove_unused_columns": False,
        "seed": 7,
    }
    return cls(
        model=tiny.llama(num_hidden_layers=1),
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=Rows() if dataset is None else dataset,
        data_collator=collator,
    )


def assert_same_batches(trainer: Recording, twin: Recording) -> None:
    assert len(trainer.seen) == len(twin.seen) > 0
    for batch, expected in zip(trainer.seen, twin.seen, strict=True):
        torch.testing.assert_close(batch, expected, rtol=0, atol=0)
    assert trainer.counts == twin.counts
    assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(twin)) == 0


def fetch_failures(report: Report) -> int:
    assert {recovery.event.phase for recovery in report.recoveries} <= {"fetch"}
    return len(report.recoveries)


class Once:
    """Raises an out-of-memory at the given calls, counted from 1."""

    def __init__(self, *at: int) -> None:
        self.at = at
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls in self.at:
            msg = "CUDA out of memory. Tried to allocate 2.00 MiB."
            raise torch.OutOfMemoryError(msg)


class RaisingRows(Rows):
    def __init__(self, fault: Once) -> None:
        super().__init__()
        self._fault = fault

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = super().__getitem__(index)
        self._fault()
        return row


def raising_collator(fault: Once, inner: Any = collate) -> Callable[[Any], Any]:
    def raising(rows: Any) -> Any:
        batch = inner(rows)
        fault()
        return batch

    return raising
