from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from oomguard.levers.batch import CannotActError, count_targets, is_flat, text_spans
from oomguard.levers.sequence import shorten
from tests import tiny
from tests.test_batch import tokenizer
from tests.test_micro_batch import (
    FLAT,
    PADDED,
    Collator,
    Text,
    sum_loss,
    targets,
    texts,
    tiny_model,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

COLLATORS = {f"padded {name}": collator for name, collator in PADDED.items()} | {
    f"flat {name}": collator for name, collator in FLAT.items()
}
PAD = 0
LIMITS = st.integers(2, 31)
# Texts of one token, which no loss can train, may be taken for the padding of a flat row.
TEXTS = texts(shortest=2)
every_collator = pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS)


def kept_texts(batch: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each text, read from the batch as a model would."""
    return [
        tuple(
            batch[key][span.row, span.start : span.stop].tolist() for key in ("input_ids", "labels")
        )
        for span in text_spans(batch)
    ]


def trained(labels: list[int]) -> list[int]:
    return [index for index, label in enumerate(labels) if index and label != -100]


def check_form(batch: Mapping[str, Any], max_length: int) -> None:
    """The batch is one that its collator could have made."""
    kept = kept_texts(batch)
    assert all(0 < len(ids) <= max_length for ids, _ in kept)
    assert all(token == before + 1 for ids, _ in kept for before, token in pairwise(ids))
    assert all(label in (-100, token) for text in kept for token, label in zip(*text, strict=True))
    lengths = [len(ids) for ids, _ in kept]
    if "position_ids" in batch:
        restarts = [position for length in lengths for position in range(length)]
        places = [batch["position_ids"][s.row, s.start : s.stop] for s in text_spans(batch)]
        assert torch.cat(places).tolist() == restarts
    if is_flat(batch):
        assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(lengths))
        if "cu_seq_lens_q" in batch:
            assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
            assert batch["cu_seq_lens_q"].diff().tolist() == lengths
            assert batch["cu_seq_lens_k"].diff().tolist() == lengths
            assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
        if "seq_idx" in batch:
            assert batch["seq_idx"].dtype == torch.int32
            assert batch["seq_idx"][0].bincount().tolist() == lengths
        return
    assert batch["input_ids"].shape == (len(kept), max(lengths))
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    torch.testing.assert_close(batch["attention_mask"], (~padding).long())
    assert set(batch["input_ids"][padding].tolist()) <= {PAD}
    assert set(batch["labels"][padding].tolist()) <= {-100}


@every_collator
@given(drawn=TEXTS, max_length=LIMITS)
@settings(max_examples=20, deadline=None)
def test_windows_train_every_target_once_after_half_a_window(
    collator: Collator, drawn: list[Text], max_length: int
) -> None:
    batch = collator(drawn)
    before = {key: torch.as_tensor(value).clone() for key, value in batch.items()}
    longest = max(len(text["input_ids"]) for text in drawn)
    shortened = shorten(batch, max_length, "windows", PAD)
    for key, value in before.items():
        torch.testing.assert_close(torch.as_tensor(batch[key]), value, rtol=0, atol=0)
    assert (shortened is batch) == (longest <= max_length)
    if shortened is batch:
        return
    wanted = {
        (text["input_ids"][index - 1], text["input_ids"][index])
        for text in drawn
        for index in trained(text["labels"])
    }
    found = targets(shortened)
    assert set(found) == wanted
    assert set(found.values()) <= {1}
    check_form(shortened, max_length)
    assert shortened.keys() == batch.keys()
    _check_context(shortened, drawn, max_length)


def _check_context(shortened: Mapping[str, Any], drawn: list[Text], max_length: int) -> None:
    firsts = {text["input_ids"][0] for text in drawn}
    whole = [text["input_ids"] for text in drawn if len(text["input_ids"]) <= max_length]
    kept = kept_texts(shortened)
    assert [ids for ids, _ in kept if ids in whole] == whole
    for ids, labels in kept:
        if ids[0] not in firsts:
            assert min(trained(labels)) >= max_length // 2
    # A window without targets is there only where there would be no batch without it.
    if any(trained(labels) for _, labels in kept):
        assert all(ids in whole or any(label != -100 for label in labels) for ids, labels in kept)


@every_collator
@given(drawn=TEXTS, max_length=LIMITS)
@settings(max_examples=20, deadline=None)
def test_truncation_leaves_every_text_a_target(
    collator: Collator, drawn: list[Text], max_length: int
) -> None:
    assume(max(len(text["input_ids"]) for text in drawn) > max_length)
    batch = collator(drawn)
    shortened = shorten(batch, max_length, "truncate", PAD)
    check_form(shortened, max_length)
    kept = kept_texts(shortened)
    assert len(kept) == len(drawn)
    for text, (ids, labels) in zip(drawn, kept, strict=True):
        assert len(ids) == min(max_length, len(text["input_ids"]))
        start = text["input_ids"].index(ids[0])
        wanted = trained(text["labels"])
        expected = [index - start for index in wanted if start <= index < start + len(ids)]
        assert trained(labels) == expected
        assert bool(expected) == bool(wanted)
        if not wanted or wanted[0] < max_length:
            assert start == 0
        else:
            assert start == min(wanted[0] - max_length // 2, len(text["input_ids"]) - max_length)
            assert expected[0] >= max_length // 2


def test_a_long_row_becomes_windows_that_overlap_by_half() -> None:
    batch = PADDED["trl"]([{"input_ids": [*range(10, 20)]}, {"input_ids": [30, 31]}])
    shortened = shorten(batch, 4, "windows", pad_token_id=1)
    windows = [list(range(start, start + 4)) for start in (10, 12, 14, 16)]
    assert shortened["input_ids"].tolist() == [*windows, [30, 31, 1, 1]]
    assert shortened["labels"][1].tolist() == [-100, -100, 14, 15]
    assert count_targets(shortened, shift=True) == count_targets(batch, shift=True)


def test_without_any_target_one_window_of_each_text_is_left() -> None:
    batch = FLAT["trl"]([{"input_ids": [*range(10, 20)], "labels": [-100] * 10}] * 2)
    assert shorten(batch, 4, "windows", PAD)["input_ids"].shape == (1, 8)


def mode_chosen(
    batch: Mapping[str, Any], pad_token_id: int = PAD
) -> Literal["windows", "truncate"]:
    chosen = shorten(batch, 4, None, pad_token_id)
    modes: tuple[Literal["windows", "truncate"], ...] = ("windows", "truncate")
    shortened = {mode: shorten(batch, 4, mode, pad_token_id) for mode in modes}
    assert shortened["windows"]["input_ids"].shape != shortened["truncate"]["input_ids"].shape
    (mode,) = [m for m in modes if torch.equal(shortened[m]["input_ids"], chosen["input_ids"])]
    return mode


@pytest.mark.parametrize("name", ["trl", "plain"])
def test_the_mode_follows_from_what_the_loss_trains(name: str) -> None:
    ids = [*range(10, 20)]
    collators = [FLAT[name], *([PADDED[name]] if name in PADDED else [])]
    prompt = [-100] * 3 + ids[3:]
    turns = [label if index % 4 else -100 for index, label in enumerate(ids)]
    for collator in collators:
        assert mode_chosen(collator([{"input_ids": ids, "labels": ids}])) == "windows"
        assert mode_chosen(collator([{"input_ids": ids, "labels": prompt}])) == "truncate"
        assert mode_chosen(collator([{"input_ids": ids, "labels": turns}])) == "truncate"
        # The first token of a text is never a target, and a text without targets tells nothing.
        first = [{"input_ids": ids, "labels": [-100, *ids[1:]]}]
        none = [{"input_ids": ids, "labels": [-100] * 10}]
        assert mode_chosen(collator(first + none)) == "windows"


def test_masked_end_of_text_tokens_make_no_prompt() -> None:
    end_as_padding = tokenizer()
    eos = end_as_padding.pad_token_id
    collator = DataCollatorForLanguageModeling(end_as_padding, mlm=False)
    batch = collator([{"input_ids": [10, 11, 12, eos, 13, 14]}, {"input_ids": [15, eos]}])
    assert batch["labels"][0].tolist() == [10, 11, 12, -100, 13, 14]
    assert mode_chosen(batch, pad_token_id=eos) == "windows"


def test_masked_language_modelling_keeps_all_its_targets() -> None:
    words = tokenizer()
    words.add_special_tokens({"mask_token": "<mask>"})
    collator = DataCollatorForLanguageModeling(words, random_replace_prob=0.0, seed=0)
    batch = collator([{"input_ids": list(range(20, 40))}] * 2)
    assert mode_chosen(batch) == "windows"
    shortened = shorten(batch, 4, None, PAD)
    wanted = count_targets(batch, shift=False)
    assert wanted
    assert count_targets(shortened, shift=False) == wanted


def test_truncation_keeps_the_classes_of_its_rows() -> None:
    rows: list[Text] = [
        {"input_ids": [2] * 9, "token_type_ids": [0] * 6 + [1] * 3, "label": 1},
        {"input_ids": [3] * 2, "token_type_ids": [0] * 2, "label": 0},
    ]
    batch = DataCollatorWithPadding(tokenizer("left"))(rows) | {"names": ["a", "b"], "scale": 0.5}
    shortened = shorten(batch, 8, "truncate", PAD)
    assert shortened["labels"].tolist() == [1, 0]
    assert shortened["names"] == ["a", "b"]
    assert shortened["token_type_ids"].tolist() == [[0] * 6 + [1, 1], [0] * 8]
    assert shortened["attention_mask"].sum(dim=1).tolist() == [8, 2]
    for mode in ("windows", None):
        with pytest.raises(CannotActError, match=r"names is a list|labels is a tensor"):
            shorten(batch, 8, mode, PAD)


@tiny.needs(DataCollatorForPreference, "max_length")  # it pads prompts and answers apart
def test_preference_pairs_are_truncated_together_and_never_cut_into_windows() -> None:
    pair = {"prompt_ids": [2] * 4, "chosen_ids": [3] * 8, "rejected_ids": [4] * 2}
    batch = DataCollatorForPreference(pad_token_id=PAD)([pair, pair])
    shortened = shorten(batch, 6, "truncate", PAD)
    assert shortened["input_ids"].shape == shortened["completion_mask"].shape == (4, 6)
    with pytest.raises(CannotActError, match="labels are missing"):
        shorten(batch, 6, "windows", PAD)


def test_positions_that_do_not_start_at_zero_are_kept() -> None:
    flat = {
        "input_ids": torch.tensor([[10, 11, 12, 13, 14, 20, 21]]),
        "labels": torch.tensor([[-100, 11, 12, 13, 14, -100, 21]]),
        "position_ids": torch.tensor([[2, 3, 4, 5, 6, 2, 3]]),
    }
    shortened = shorten(flat, 4, "windows", PAD)
    assert shortened["position_ids"].tolist() == [[2, 3, 4, 5, 2, 3, 4, 2, 3]]


ROWS = PADDED["trl"]([{"input_ids": [*range(10, 20)]}, {"input_ids": [30, 31]}])
SHAPE = ROWS["input_ids"].shape
HIDDEN = torch.zeros(SHAPE, dtype=torch.long)
HIDDEN[:, :6] = 1


@pytest.mark.parametrize("mode", ["windows", "truncate", None])
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("shift_labels", ROWS["labels"], "shift_labels is a tensor"),
        ("labels", ROWS["labels"][:, :4], r"labels is a tensor of shape \(2, 4\)"),
        ("decoder_input_ids", ROWS["labels"], "decoder_input_ids is a tensor"),
        ("pixel_values", torch.ones(6, 3), "pixel_values is a tensor"),
        ("weights", torch.ones(SHAPE), "weights is a tensor"),
        ("images", ["one", "two", "three"], "images is a list of length 3"),
        ("position_ids", HIDDEN, "position_ids start anew within a row"),
        ("attention_mask", HIDDEN, "labels train tokens that attention_mask hides"),
    ],
)
def test_what_cannot_be_cut_is_named(
    key: str, value: object, reason: str, mode: Literal["windows", "truncate"] | None
) -> None:
    batch = ROWS | {key: value}
    with pytest.raises(CannotActError, match=reason):
        shorten(batch, 4, mode, PAD)
    assert shorten(batch, 10, mode, PAD) is batch


def test_a_batch_without_tokens_cannot_be_shortened() -> None:
    with pytest.raises(CannotActError, match="input_ids"):
        shorten({"pixel_values": torch.ones(2, 3)}, 4, None, PAD)


def test_a_length_that_leaves_nothing_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        shorten(ROWS, 1, None, PAD)


def test_windows_of_rows_and_of_documents_have_the_same_loss() -> None:
    model = tiny_model("sdpa")
    drawn: list[Text] = [{"input_ids": torch.randint(2, 400, (n,)).tolist()} for n in (40, 9, 23)]
    collators = [PADDED["trl"], PADDED["trl with positions"], FLAT["trl"], FLAT["plain"]]
    left = DataCollatorForSeq2Seq(tokenizer("left"))
    batches = [collator(drawn) for collator in collators]
    batches.append(left([text | {"labels": text["input_ids"]} for text in drawn]))
    losses = [sum_loss(model, shorten(batch, 12, "windows", PAD)) for batch in batches]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
