"""Batches reach the step in order, none lost and none twice, whatever fails on their way."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import BatchEncoding, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

import oomguard
from oomguard.testing import VirtualCard
from tests import tiny
from tests.allocations import NEVER_SPENT, LoggingCard
from tests.feed import (
    LADDER,
    Once,
    RaisingRows,
    Recording,
    RowsByBatch,
    Stream,
    assert_same_batches,
    collate,
    fetch_failures,
    make,
    raising_collator,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.twin import Build


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
