"""Input tokens are counted as the Trainer itself counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from trl import SFTTrainer

from oomguard.levers import tokens
from tests import tiny
from tests.kinds import sft

if TYPE_CHECKING:
    from pathlib import Path

PADDING_FREE: dict[str, Any] = {
    "padding_free": True,
    "max_length": None,
    "pad_to_multiple_of": 64,
}


class Watched(SFTTrainer):
    """Remembers its batches."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("seen", []).append(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("how", ["no", "all", "non_padding"])
@pytest.mark.parametrize("changes", [{}, PADDING_FREE], ids=["padded", "padding-free"])
def test_a_batch_is_counted_as_the_trainer_counts_it(
    tmp_path: Path, how: str, changes: dict[str, Any]
) -> None:
    trainer: Any = sft(
        tmp_path,
        trainer_class=Watched,
        max_steps=1,
        dataset=tiny.text_dataset(8),
        include_num_input_tokens_seen=how,
        **changes,
    )
    trainer.train()
    state, empty = trainer.state, {"input_ids": trainer.seen[0]["input_ids"][:0]}
    counted = state.num_input_tokens_seen
    assert (counted == 0) is (how == "no")
    assert (counted < sum(b["input_ids"].numel() for b in trainer.seen)) is (how != "all")
    state.num_input_tokens_seen = 0
    for batch in trainer.seen:
        tokens.recount(trainer, empty, batch)
    assert state.num_input_tokens_seen == counted
    tokens.recount(trainer, batch, batch)
    assert state.num_input_tokens_seen == counted
