"""Batches reach the step in order, none lost and none twice, whatever fails on their way."""

from __future__ import annotations

import multiprocessing
import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import oomguard
from oomguard.testing import VirtualCard
from tests import tiny
from tests.test_every_allocation import NEVER_SPENT, LoggingCard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from oomguard.report import Report
    from tests.twin import Build

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


def fail_in_turn(build: Build, folder: Path, most: int) -> None:
    """Fail the allocations of fetching one at a time: about `most` of them, from first to last."""
    card = LoggingCard(build)
    twin = card.build(folder)
    with card:
        assert not oomguard.fit(twin).recoveries
    fetching = card.numbers("fetch")
    assert fetching
    for k in sorted({*fetching[:: -(-len(fetching) // most)], fetching[-1]}):
        trainer: Any = build(folder)
        with VirtualCard(fail_at=k):
            assert fetch_failures(oomguard.fit(trainer, ladder=LADDER)) == 1
        assert_same_batches(trainer, twin)


# Single operations.


def test_any_allocation_may_fail_while_batches_are_fetched_counted_and_moved(
    tmp_path: Path,
) -> None:
    fail_in_turn(make, tmp_path, most=20)


def test_any_allocation_may_fail_while_a_stream_is_read(tmp_path: Path) -> None:
    fail_in_turn(partial(make, dataset=Stream(), max_steps=3), tmp_path, most=10)


def masking_collator(**arguments: Any) -> DataCollatorForLanguageModeling:
    plain = tiny.tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, pad_token="<pad>", mask_token="<eos>"
    )
    return DataCollatorForLanguageModeling(tokenizer, mlm=True, **arguments)


@pytest.mark.parametrize("seed", [None, 5])
def test_random_masks_are_drawn_anew_the_same(seed: int | None, tmp_path: Path) -> None:
    def build(folder: Path) -> Any:  # with a seed, a collator has a generator of its own
        return make(folder, collator=masking_collator(seed=seed), max_steps=2)

    fail_in_turn(build, tmp_path, most=20)


# Python code that raises, as a kernel of another library would.


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


class RaisingRowsByBatch(RowsByBatch):
    def __init__(self, fault: Once) -> None:
        super().__init__()
        self._fault = fault

    def __getitems__(self, indices: list[int]) -> list[dict[str, list[int]]]:
        rows = super().__getitems__(indices)
        self._fault()
        return rows


class RaisingBatch(BatchEncoding):
    fault: Once

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        self.fault()
        return super().to(device, non_blocking=non_blocking)


class RaisingCount(Recording):
    fault: Once

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        self.fault()
        return super()._get_num_items_in_batch(batch_samples, device)


def raising_collator(fault: Once, inner: Any = collate) -> Callable[[Any], Any]:
    def raising(rows: Any) -> Any:
        batch = inner(rows)
        fault()
        return batch

    return raising


def collate_for_a_raising_move(fault: Once) -> Callable[[Any], Any]:
    kind = type("RaisingBatch", (RaisingBatch,), {"fault": staticmethod(fault)})
    return lambda rows: kind(dict(collate(rows)))


def raising_count(folder: Path, fault: Once) -> Any:
    cls = type("RaisingCount", (RaisingCount,), {"fault": staticmethod(fault)})
    return make(folder, cls=cls)


RAISING: dict[str, Callable[[Path, Once], Any]] = {
    "collator": lambda folder, fault: make(folder, collator=raising_collator(fault)),
    "row": lambda folder, fault: make(folder, dataset=RaisingRows(fault)),
    "rows": lambda folder, fault: make(folder, dataset=RaisingRowsByBatch(fault)),
    "move": lambda folder, fault: make(folder, collator=collate_for_a_raising_move(fault)),
    "count": raising_count,
}


@pytest.mark.parametrize("at", [(1,), (2,), (3,), (6,), (2, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("place", RAISING)
def test_an_error_raised_in_python_on_the_way_loses_no_row(
    place: str, at: tuple[int, ...], tmp_path: Path
) -> None:
    twin = make(tmp_path)
    twin.train()
    fault = Once(*at)
    trainer = RAISING[place](tmp_path, fault)
    report = oomguard.fit(trainer, ladder=NEVER_SPENT)
    assert fault.calls > max(at)
    assert fetch_failures(report) == len(at)
    assert trainer.order == twin.order


def test_masks_are_the_same_after_an_error_raised_in_python(tmp_path: Path) -> None:
    twin = make(tmp_path, collator=masking_collator())
    twin.train()
    fault = Once(3)
    trainer = make(tmp_path, collator=raising_collator(fault, masking_collator()))
    assert fetch_failures(oomguard.fit(trainer)) == 1
    assert_same_batches(trainer, twin)


class RaisingStream(Stream):
    def __init__(self, fault: Once) -> None:
        self._fault = fault

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for row in super().__iter__():
            self._fault()
            yield row


def test_an_error_out_of_a_stream_is_no_end_of_the_epoch(tmp_path: Path) -> None:
    # A generator that raised is over: nobody could go on with it without losing rows.
    trainer = make(tmp_path, dataset=RaisingStream(Once(7)))
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2.00 MiB") as raised:
        oomguard.fit(trainer)
    assert not isinstance(raised.value, oomguard.LadderExhaustedError)
    assert trainer.order == [[0, 1], [2, 3]]


def test_other_errors_on_the_way_are_the_users(tmp_path: Path) -> None:
    problem = ValueError("row 3 is broken: out of memory of it")

    def broken(rows: Any) -> Any:
        raise problem

    with pytest.raises(ValueError, match="row 3") as raised:
        oomguard.fit(make(tmp_path, collator=broken))
    assert raised.value is problem


def test_a_lasting_shortage_ends_the_training_with_the_ladders_error(tmp_path: Path) -> None:
    trainer = make(tmp_path, collator=raising_collator(Once(*range(6, 99))))
    # The loader is one batch ahead: the sixth is asked for with the second step's.
    with pytest.raises(oomguard.LadderExhaustedError, match="in fetch of optimizer step 3"):
        oomguard.fit(trainer, ladder=LADDER)
    assert trainer.state.global_step == 2
    assert len(trainer.order) == 4


# Loaders.


class InWorker(Rows):
    """Says in which worker a row was made; its attributes are set there."""

    shift = 0

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        worker = get_worker_info()
        row = super().__getitem__(index)
        last = 400 + self.shift if worker is not None else 0
        return {"input_ids": [*row["input_ids"], last]}


def shift_rows(worker: int) -> None:
    info: Any = get_worker_info()
    info.dataset.shift = 5


def test_worker_processes_load_the_same_batches(tmp_path: Path) -> None:
    twin = make(tmp_path)
    twin.train()
    trainer = make(tmp_path, dataset=InWorker(), dataloader_num_workers=2, max_steps=3)
    with VirtualCard(fail_at=4):
        assert len(oomguard.fit(trainer, ladder=LADDER).recoveries) == 1
    assert trainer.order == twin.order[:6]
    assert all((batch["input_ids"] == 400).any() for batch in trainer.seen)


class OwnLoader(Recording):
    """Makes its loader once, in its own way, and returns it every time."""

    loader_settings: dict[str, Any]
    loader: Any = None

    def get_train_dataloader(self) -> Any:
        if self.loader is None:
            rows: Any = self.train_dataset
            settings = {"batch_size": 2, "collate_fn": collate, **self.loader_settings}
            self.loader = DataLoader(rows, **settings)
        return self.loader


def own_loader(**settings: Any) -> type[OwnLoader]:
    return type("OwnLoader", (OwnLoader,), {"loader_settings": settings})


def test_what_a_worker_sets_on_its_data_set_is_set(tmp_path: Path) -> None:
    cls = own_loader(num_workers=1, worker_init_fn=shift_rows)
    trainer = make(tmp_path, dataset=InWorker(), cls=cls, max_steps=1)
    oomguard.fit(trainer)
    assert all((batch["input_ids"] == 405).any() for batch in trainer.seen)


def test_a_loader_goes_to_spawned_workers(tmp_path: Path) -> None:
    cls = own_loader(num_workers=1, multiprocessing_context=multiprocessing.get_context("spawn"))
    trainer = make(tmp_path, dataset=InWorker(), cls=cls, max_steps=1)
    oomguard.fit(trainer)
    assert trainer.order == [[0, 1], [2, 3]]


def test_the_rows_and_the_collator_of_a_guarded_loader_can_be_pickled(tmp_path: Path) -> None:
    trainer = make(tmp_path, dataset=InWorker())
    with oomguard.Guard(trainer):
        loader = trainer.get_train_dataloader()
        dataset, collate_rows = pickle.loads(  # noqa: S301 - our own bytes
            pickle.dumps((loader.dataset, loader.collate_fn))
        )
    assert len(dataset) == ROWS
    assert collate_rows([dataset[3]])["input_ids"][0, 0] == 3


def test_the_data_set_that_callbacks_see_is_the_users(tmp_path: Path) -> None:
    trainer = make(tmp_path, dataset=InWorker())
    with oomguard.Guard(trainer):
        dataset: Any = trainer.get_train_dataloader().dataset
        dataset.shift = 3
        assert trainer.train_dataset.shift == 3
        assert dataset.asked is trainer.train_dataset.asked
        with pytest.raises(AttributeError, match="nothing"):
            _ = dataset.nothing


class Keeping(Recording):
    """Keeps every loader that it was given."""

    loaders: tuple[Any, ...] = ()

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        self.loaders += (loader,)
        return loader


def test_the_loader_is_left_as_it_was(tmp_path: Path) -> None:
    trainer = make(tmp_path, cls=Keeping, max_steps=1)
    oomguard.fit(trainer)
    (loader,) = trainer.loaders
    plain = loader.base_dataloader
    assert plain.dataset is trainer.train_dataset
    assert plain.collate_fn is collate
    assert loader.device == torch.device("cpu")
    assert [batch["input_ids"].shape[0] for batch in loader] == [2] * (ROWS // 2)


def test_a_loader_that_is_the_same_every_time_is_left_as_it_was_too(tmp_path: Path) -> None:
    trainer = make(tmp_path, cls=own_loader(), max_steps=2)
    loader = trainer.get_train_dataloader()
    for at in (2, 4):
        fault = Once(at)
        loader.collate_fn = raising_collator(fault)
        before = dict(vars(loader))
        trainer.seen = ()
        oomguard.fit(trainer, ladder=LADDER)
        assert trainer.order == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert fault.calls == 5
        assert vars(loader) == before
    fault.at = (fault.calls + 1,)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()  # nothing of the guard is left


def test_the_loader_is_left_as_it_was_when_training_fails(tmp_path: Path) -> None:
    trainer = make(tmp_path, cls=own_loader(), dataset=RaisingRows(Once(*range(1, 99))))
    with pytest.raises(oomguard.LadderExhaustedError):
        oomguard.fit(trainer)
    assert trainer.loader.dataset is trainer.train_dataset
    assert trainer.loader.collate_fn is collate


def test_a_resumed_training_goes_on_at_the_exact_row(tmp_path: Path) -> None:
    twin = make(tmp_path, save_strategy="steps", save_steps=2)
    twin.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    for fault in (Once(1), Once(3), Once(5), Once(8)):
        trainer = make(tmp_path, collator=raising_collator(fault))
        report = oomguard.fit(trainer, ladder=LADDER, resume_from_checkpoint=checkpoint)
        assert fetch_failures(report) == 1
        assert trainer.order == twin.order[4:]
        assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(twin)) == 0


def test_any_allocation_may_fail_while_a_resumed_training_skips_batches(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    card = LoggingCard(partial(make, max_steps=3))
    twin = card.build(tmp_path)
    with card:
        oomguard.fit(twin, resume_from_checkpoint=checkpoint)
    assert len(twin.order) == 2
    for k in card.numbers("fetch")[::6]:
        trainer = make(tmp_path, max_steps=3)
        with VirtualCard(fail_at=k):
            oomguard.fit(trainer, ladder=LADDER, resume_from_checkpoint=checkpoint)
        assert_same_batches(trainer, twin)
