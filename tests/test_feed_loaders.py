"""Guarded loaders: worker processes, loaders of the user's own, and what is left of the guard."""

from __future__ import annotations

import multiprocessing
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

import oomguard
from oomguard.testing import VirtualCard
from tests.feed import (
    LADDER,
    ROWS,
    Once,
    RaisingRows,
    Recording,
    Rows,
    collate,
    make,
    raising_collator,
)

if TYPE_CHECKING:
    from pathlib import Path


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
