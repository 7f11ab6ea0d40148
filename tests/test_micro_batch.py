from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BatchEncoding,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from oomguard.levers.batch import CannotActError, count_targets, document_starts
from oomguard.levers.micro_batch import split
from tests.test_batch import POSITIONS, tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

Text = dict[str, Any]
Collator = Callable[[list[Text]], dict[str, Any]]
STRIDE = 50  # more than the longest text: a token names its text and its position in it


@st.composite
def texts(draw: st.DrawFn, shortest: int = 1) -> list[Text]:
    """Texts trained whole, in their completion, here and there, or not at all."""
    drawn = []
    lengths = draw(st.lists(st.integers(shortest, 30), min_size=1, max_size=9))
    for index, length in enumerate(lengths):
        ids = [2 + index * STRIDE + position for position in range(length)]
        every = 2**length - 1
        prompt = draw(st.integers(0, length))
        completion = every >> prompt << prompt
        trained = draw(st.sampled_from([every, completion]) | st.integers(0, every))
        labels = [token if trained >> position & 1 else -100 for position, token in enumerate(ids)]
        drawn.append({"input_ids": ids, "labels": labels})
    return drawn


PADDED: dict[str, Collator] = {
    "trl": TRLCollator(pad_token_id=0),
    "trl with positions": TRLCollator(0, pad_to_multiple_of=8, **POSITIONS),
    "left": DataCollatorForSeq2Seq(tokenizer("left")),
    "right": DataCollatorForSeq2Seq(tokenizer("right"), pad_to_multiple_of=4),
}
FLAT: dict[str, Collator] = {
    "trl": TRLCollator(pad_token_id=0, padding_free=True),
    "trl with padding": TRLCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=8),
    "plain": DataCollatorWithFlattening(),
    "all hints": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "bounds only": DataCollatorWithFlattening(
        return_position_ids=False, return_flash_attn_kwargs=True
    ),
}


def targets(batch: Mapping[str, Any]) -> Counter[tuple[int, int]]:
    """Every target that the loss sees, with the token that comes before it."""
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    return Counter(
        (before, token)
        for row, row_labels in zip(ids, labels, strict=True)
        for (before, token), label in zip(pairwise(row), row_labels[1:], strict=True)
        if label != -100
    )


def join(passes: list[dict[str, Any]], key: str, dim: int) -> torch.Tensor:
    return torch.cat([part[key] for part in passes], dim=dim)


@pytest.mark.parametrize("collator", PADDED.values(), ids=PADDED)
@given(drawn=texts(), max_tokens=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_passes_of_a_padded_batch_are_its_rows(
    collator: Collator, drawn: list[Text], max_tokens: int
) -> None:
    batch = collator(drawn)
    before = {key: value.clone() for key, value in batch.items()}
    passes = split(batch, max_tokens)
    for key, value in before.items():
        torch.testing.assert_close(batch[key], value, rtol=0, atol=0)
        torch.testing.assert_close(join(passes, key, dim=0), value, rtol=0, atol=0)
    rows = [len(part["input_ids"]) for part in passes]
    most = max(1, max_tokens // batch["input_ids"].shape[1])
    assert max(rows) <= most
    assert max(rows) - min(rows) <= 1
    assert rows == sorted(rows, reverse=True)
    assert len(rows) == -(-len(drawn) // most)
    assert sum(map(targets, passes), Counter()) == targets(batch)
    assert sum(count_targets(part, shift=True) or 0 for part in passes) == count_targets(
        batch, True
    )
    assert all(type(part) is dict and part.keys() == batch.keys() for part in passes)


@pytest.mark.parametrize("collator", FLAT.values(), ids=FLAT)
@given(drawn=texts(), max_tokens=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_passes_of_a_flat_batch_are_what_its_collator_makes_of_their_texts(
    collator: Collator, drawn: list[Text], max_tokens: int
) -> None:
    batch = collator(drawn)
    passes = split(batch, max_tokens)
    for key in ("input_ids", "labels", "position_ids"):
        if key in batch:
            torch.testing.assert_close(join(passes, key, dim=1), batch[key], rtol=0, atol=0)
    assert sum(map(targets, passes), Counter()) == targets(batch)
    assert all(token == before + 1 for before, token in targets(batch))

    remaining = list(drawn)
    for part in passes:
        tokens = part["input_ids"][0].tolist()
        inside = [text for text in remaining if text["input_ids"][0] in tokens]
        assert inside == remaining[: len(inside)]
        remaining = remaining[len(inside) :]
        own = collator(inside)
        padding = len(tokens) - sum(len(text["input_ids"]) for text in inside)
        # The padding ends the last pass as it ended the batch; the collator would pad each pass.
        if padding == own["input_ids"].shape[1] - len(tokens) == 0:
            for key, value in own.items():
                torch.testing.assert_close(part[key], value, rtol=0, atol=0)
        _check_boundaries(part)
        # A last text of one token may be taken for padding: no loss can tell them apart.
        units = len(inside) - (len(inside) > 1 and len(inside[-1]["input_ids"]) == 1)
        assert len(tokens) <= max_tokens or units == 1
    assert not remaining


def _check_boundaries(part: dict[str, Any]) -> None:
    total = part["input_ids"].shape[1]
    if "cu_seq_lens_q" in part:
        lengths = part["cu_seq_lens_q"].diff()
        assert part["cu_seq_lens_q"].dtype == torch.int32
        assert int(lengths.sum()) == total
        assert part["max_length_q"] == part["max_length_k"] == int(lengths.max())
        torch.testing.assert_close(part["cu_seq_lens_k"], part["cu_seq_lens_q"])
    if "seq_idx" in part:
        assert part["seq_idx"].dtype == torch.int32
        assert int(part["seq_idx"][0, 0]) == 0
        assert part["seq_idx"][0].bincount().tolist() == lengths.tolist()
    if "position_ids" in part:
        assert int(part["position_ids"][0, 0]) == 0


def test_eight_rows_with_room_for_three_make_passes_of_three_three_and_two() -> None:
    batch = PADDED["trl"]([{"input_ids": [2, 3, 4, 5]}] * 8)
    assert [len(part["input_ids"]) for part in split(batch, 15)] == [3, 3, 2]


def test_a_batch_that_fits_is_one_pass_and_stays_apart_from_what_is_done_to_it() -> None:
    batch = PADDED["left"]([{"input_ids": [2, 3], "labels": [2, 3]}] * 2)
    assert isinstance(batch, BatchEncoding)
    (only,) = split(batch, 4)
    assert only == dict(batch)
    only.pop("labels")  # as the Trainer does for label smoothing
    assert "labels" in batch


def test_padding_of_a_flat_batch_stays_with_its_last_document() -> None:
    texts = [{"input_ids": list(range(start, start + 5))} for start in (10, 20)]
    first, last = split(FLAT["trl with padding"](texts), 5)
    assert first["input_ids"].tolist() == [[10, 11, 12, 13, 14]]
    assert last["input_ids"].tolist() == [[20, 21, 22, 23, 24, 0, 0, 0, 0, 0, 0]]
    assert document_starts(last) == [0, 5, 6, 7, 8, 9, 10]
    assert len(split(FLAT["trl with padding"](texts[:1]), 1)) == 1


def test_sequence_to_sequence_batches_are_cut_by_rows() -> None:
    config = T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    collator = DataCollatorForSeq2Seq(tokenizer(), model=T5ForConditionalGeneration(config))
    batch = collator([{"input_ids": [i] * 5, "labels": [i] * (i + 1)} for i in range(2, 6)])
    passes = split(batch, 10)
    assert len(passes) == 2
    for key in ("input_ids", "attention_mask", "labels", "decoder_input_ids"):
        assert passes[0][key].shape[1] == batch[key].shape[1]
        torch.testing.assert_close(join(passes, key, dim=0), batch[key])


def test_classification_rows_keep_their_label_and_their_list_entry() -> None:
    rows: list[Text] = [{"input_ids": [i] * 3, "label": i} for i in range(3)]
    batch = DataCollatorWithPadding(tokenizer())(rows)
    extra = {"names": ["a", "b", "c"], "pairs": (1, 2, 3), "step": torch.tensor(7), "kind": "x"}
    passes = split(batch | extra, 6)
    assert [part["labels"].tolist() for part in passes] == [[0, 1], [2]]
    assert [part["names"] for part in passes] == [["a", "b"], ["c"]]
    assert [part["pairs"] for part in passes] == [(1, 2), (3,)]
    assert all(part["kind"] == "x" and int(part["step"]) == 7 for part in passes)


def test_further_entries_of_a_flat_batch_are_cut_by_columns() -> None:
    weights = torch.rand(1, 3, 2)
    flat = {
        "input_ids": torch.tensor([[2, 3, 4]]),
        "labels": torch.tensor([[2, 3, 4]]),
        "position_ids": torch.tensor([[0, 1, 0]]),
        # Where these are, the loss reads them as they are, and documents may touch.
        "shift_labels": torch.tensor([[3, 4, 5]]),
        "weights": weights,
        "max_length_q": torch.tensor(2),
        "max_length_k": 2,
        "scale": 0.5,
    }
    first, last = split(flat, 2)
    torch.testing.assert_close(first["weights"], weights[:, :2])
    torch.testing.assert_close(last["weights"], weights[:, 2:])
    assert last["shift_labels"].tolist() == [[5]]
    torch.testing.assert_close(last["max_length_q"], torch.tensor(1))
    assert last["max_length_k"] == 1
    assert first["scale"] == last["scale"] == 0.5


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("pixel_values", torch.ones(37, 8), r"pixel_values is a tensor of shape \(37, 8\)"),
        ("cu_seq_lens_q", torch.tensor([0, 2, 4, 8]), "cu_seq_lens_q is a tensor"),
        ("images", ["one"], "images is a list of length 1"),
        ("cache", {"layer": 1}, "cache is a dict"),
    ],
)
def test_what_belongs_to_no_row_cannot_be_cut(key: str, value: object, reason: str) -> None:
    batch = PADDED["trl"]([{"input_ids": [2, 3]}] * 4) | {key: value}
    with pytest.raises(CannotActError, match=reason):
        split(batch, 4)
    assert len(split(batch, 8)) == 1


def test_what_belongs_to_no_token_of_a_flat_batch_cannot_be_cut() -> None:
    # As many entries as the batch has rows: one.
    batch = FLAT["plain"]([{"input_ids": [2, 3]}] * 4) | {"labels": torch.tensor([1])}
    with pytest.raises(CannotActError, match=r"labels is a tensor of shape \(1,\)"):
        split(batch, 4)


def test_documents_trained_from_one_another_cannot_be_cut() -> None:
    batch = DataCollatorWithFlattening(separator_id=9)([{"input_ids": [2, 3]}] * 4)
    with pytest.raises(CannotActError, match="labels train the first token of a document"):
        split(batch, 4)


def test_a_batch_without_tokens_cannot_be_cut() -> None:
    with pytest.raises(CannotActError, match="input_ids"):
        split({"pixel_values": torch.ones(4, 3, 8, 8)}, 4)


def sum_loss(model: LlamaForCausalLM, batch: Mapping[str, Any]) -> float:
    """The sum over all targets, computed as in training.

    With a cache, which the Trainer turns off, documents of a flat batch would see each other.
    """
    with torch.no_grad():
        return float(model(**batch, num_items_in_batch=1, use_cache=False).loss)


def tiny_model(attention: str) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    model.eval()
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_of_the_passes_add_up_to_that_of_the_batch(attention: str) -> None:
    model = tiny_model(attention)
    lengths = (9, 30, 4, 17, 2, 25)
    drawn: list[Text] = [
        {"input_ids": torch.randint(2, 400, (length,)).tolist()} for length in lengths
    ]
    for text in drawn:
        text["labels"] = [-100, *text["input_ids"][1:]]
    rows = sum_loss(model, PADDED["trl"](drawn))
    for collator in (*PADDED.values(), *FLAT.values()):
        if collator is FLAT["bounds only"]:
            continue  # for flash attention: no other implementation reads the bounds
        batch = collator(drawn)
        whole = sum_loss(model, batch)
        # Positions alone keep the documents of a flat batch apart.
        assert whole == pytest.approx(rows, rel=1e-6)
        for max_tokens in (1, 31, 70):
            passes = split(batch, max_tokens)
            assert len(passes) > 1
            assert sum(sum_loss(model, part) for part in passes) == pytest.approx(whole, rel=1e-6)
