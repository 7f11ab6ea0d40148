"""Real text that comes with every Python, and a tokenizer trained on it."""

from __future__ import annotations

import pydoc_data.topics
from functools import cache
from itertools import cycle, islice

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@cache
def text() -> str:
    """The topics of Python's language reference, which come with every Python."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics.values())


@cache
def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of that many tokens, trained on the text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator(text().split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1])


@cache
def _tokens(vocabulary: int) -> tuple[int, ...]:
    return tuple(tokenizer(vocabulary)(text())["input_ids"])


def cut(vocabulary: int, lengths: list[int]) -> list[list[int]]:
    """One piece of the text after another; from its start again when it ends."""
    source = cycle(_tokens(vocabulary))
    return [list(islice(source, length)) for length in lengths]
