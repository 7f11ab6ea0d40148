from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from oomguard.levers.batch import (
    BOUNDARY_KEYS,
    CannotActError,
    Shape,
    Span,
    count_targets,
    document_starts,
    documents,
    is_flat,
    measure,
    rebuild_boundaries,
    text_spans,
)
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Padded rows with positions, where TRL's collator can give them.
POSITIONS: dict[str, Any] = (
    {"return_position_ids": True} if tiny.takes(TRLCollator, "return_position_ids") else {}
)
LENGTHS = st.lists(st.integers(2, 20), min_size=1, max_size=6)


def tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, "<unk>"))
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, padding_side=padding_side, **special)


def examples(lengths: list[int]) -> list[dict[str, Any]]:
    """Texts of these lengths in which no token occurs twice."""
    return [{"input_ids": list(range(a, b))} for a, b in pairwise(accumulate(lengths, initial=2))]


def flat_batches(lengths: list[int]) -> list[dict[str, Any]]:
    """The same texts out of every collator, and every option of one, that makes a flat row."""
    texts = examples(lengths)
    packed = [{"input_ids": list(range(2, 2 + sum(lengths))), "seq_lengths": lengths}]
    hints: dict[str, Any] = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
    only_bounds: dict[str, Any] = {"return_position_ids": False, "return_flash_attn_kwargs": True}
    only_index: dict[str, Any] = {"return_position_ids": False, "return_seq_idx": True}
    flat = [
        TRLCollator(pad_token_id=0, padding_free=True)(texts),
        TRLCollator(pad_token_id=0, padding_free=True)(packed),
        TRLCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)(texts),
        DataCollatorWithFlattening()(texts),
        DataCollatorWithFlattening(**hints)(texts),
        DataCollatorWithFlattening(**only_bounds)(texts),
        DataCollatorWithFlattening(**only_index)(texts),
    ]
    if tiny.takes(DataCollatorWithFlattening, "position_ids_start"):
        # As RoBERTa numbers its positions.
        flat.append(DataCollatorWithFlattening(position_ids_start=2)(texts))
    return flat


@given(lengths=LENGTHS)
@settings(max_examples=40, deadline=None)
def test_documents_of_every_flat_batch_are_the_texts_that_went_in(lengths: list[int]) -> None:
    texts = [Span(0, start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]
    for batch in flat_batches(lengths):
        assert is_flat(batch)
        assert documents(batch) == text_spans(batch) == texts
        tokens = batch["input_ids"].shape[1]
        assert measure(batch) == Shape(units=len(lengths), width=max(lengths), tokens=tokens)


@tiny.needs(TRLCollator, "return_position_ids")  # and gives every hint
@given(lengths=LENGTHS)
@settings(max_examples=40, deadline=None)
def test_every_hint_of_a_flat_batch_gives_the_same_starts_as_trl(lengths: list[int]) -> None:
    batch = TRLCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)(examples(lengths))
    expected = batch["cu_seq_lens_q"][:-1].tolist()
    for hint in ("position_ids", "seq_idx", "cu_seq_lens_q"):
        alone = {"input_ids": batch["input_ids"], hint: batch[hint]}
        assert is_flat(alone)
        assert document_starts(alone) == expected


@given(lengths=LENGTHS)
@settings(max_examples=40, deadline=None)
def test_boundaries_rebuilt_for_the_same_documents_are_the_collators(lengths: list[int]) -> None:
    for batch in flat_batches(lengths):
        bounds = [*document_starts(batch), batch["input_ids"].shape[1]]
        rebuilt = rebuild_boundaries(batch, [stop - start for start, stop in pairwise(bounds)])
        assert rebuilt.keys() == batch.keys() & set(BOUNDARY_KEYS)
        for key, value in rebuilt.items():
            torch.testing.assert_close(value, batch[key], rtol=0, atol=0)


def test_rebuilt_boundaries_keep_the_type_they_had() -> None:
    batch = {"max_length_q": torch.tensor(9, dtype=torch.int16), "cu_seq_lens_k": None}
    rebuilt = rebuild_boundaries(batch, [3, 2])
    torch.testing.assert_close(rebuilt["max_length_q"], torch.tensor(3, dtype=torch.int16))
    assert rebuilt["cu_seq_lens_k"] is None
    with pytest.raises(CannotActError, match="cu_seq_lens_q is a list of length 2"):
        rebuild_boundaries({"cu_seq_lens_q": [0, 5]}, [3, 2])


def test_a_last_document_of_one_token_is_told_from_padding_by_its_label() -> None:
    flat = {"input_ids": torch.tensor([[5, 6, 7, 7]]), "seq_idx": torch.tensor([[0, 0, 1, 2]])}
    assert documents(flat) == [Span(0, 0, 2)]
    trained = flat | {"labels": torch.tensor([[-100, 6, 7, -100]])}
    assert documents(trained) == [Span(0, 0, 2), Span(0, 2, 3)]
    assert documents({"input_ids": torch.tensor([[7]]), "seq_idx": torch.tensor([[0]])})


@given(
    lengths=LENGTHS, side=st.sampled_from(["left", "right"]), multiple=st.sampled_from([None, 8])
)
@settings(max_examples=60, deadline=None)
def test_padded_batches_are_measured_with_padding_and_read_without(
    lengths: list[int], side: str, multiple: int | None
) -> None:
    texts = examples(lengths)
    collators: list[Callable[[list[dict[str, Any]]], Mapping[str, Any]]] = [
        DataCollatorWithPadding(tokenizer(side), pad_to_multiple_of=multiple),
        DataCollatorForSeq2Seq(tokenizer(side), pad_to_multiple_of=multiple),
        DataCollatorForLanguageModeling(tokenizer(side), mlm=False, pad_to_multiple_of=multiple),
        TRLCollator(pad_token_id=0, pad_to_multiple_of=multiple, **POSITIONS),
    ]
    for collator in collators:
        batch = collator(texts)
        rows, width = batch["input_ids"].shape
        assert not is_flat(batch)
        assert measure(batch) == Shape(units=rows, width=width, tokens=rows * width)
        read = [batch["input_ids"][s.row, s.start : s.stop].tolist() for s in text_spans(batch)]
        assert read == [text["input_ids"] for text in texts]


def test_spans_without_a_mask_are_full_and_rows_of_padding_are_empty() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    assert text_spans({"input_ids": ids}) == [Span(0, 0, 3), Span(1, 0, 3)]
    mask = torch.tensor([[0, 0, 0], [0, 1, 0]])
    assert [len(span) for span in text_spans({"input_ids": ids, "attention_mask": mask})] == [0, 1]


def test_a_single_row_with_a_mask_is_not_flat() -> None:
    batch = TRLCollator(pad_token_id=0)(examples([4])) | {"position_ids": torch.arange(4)[None]}
    assert not is_flat(batch)
    assert is_flat(batch | {"attention_mask": None})


@pytest.mark.parametrize(
    "batch",
    [
        [{"prompt": "a list, as generation trainers get it"}],
        {"prompt_ids": torch.ones(2, 3, dtype=torch.long)},
        {"input_ids": torch.ones(2, 3)},
        {"input_ids": torch.ones(3, dtype=torch.long)},
        {"input_ids": torch.ones(0, 3, dtype=torch.long)},
        {"input_ids": [[1, 2]]},
    ],
)
def test_what_has_no_token_tensor_is_not_measured(batch: object) -> None:
    assert measure(batch) is None


def test_targets_are_counted_as_the_loss_sees_them() -> None:
    labels = torch.tensor([[5, 6, -100], [-100, -100, 8]])
    assert count_targets({"labels": labels}, shift=True) == 2
    assert count_targets({"labels": labels}, shift=False) == 3
    # Shifted already, so nothing of it is left out.
    assert count_targets({"labels": labels[:1], "shift_labels": labels}, shift=True) == 3


@pytest.mark.parametrize(
    "labels", [None, torch.tensor([0, 1]), torch.tensor([[0.5, 1.0]]), [[1, 2]]]
)
def test_labels_that_are_not_per_token_are_not_counted(labels: object) -> None:
    assert count_targets({"labels": labels}, shift=True) is None
    assert count_targets({}, shift=True) is None
