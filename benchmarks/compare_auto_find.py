"""One long row late in the epoch: `auto_find_batch_size` and `oomguard.fit` on the same card.

    python -m benchmarks.compare_auto_find

Three trainings on one epoch of the same 128 rows, 16 a step: on a card with room (the twin), with
`auto_find_batch_size=True`, and under oomguard. On the card of the last two, all batches fit but
the one of step 6 with the long row.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich
import torch
from datasets import Dataset
from rich.table import Table
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

import oomguard
from oomguard.testing import VirtualCard
from tests import tiny

ROWS, LONG_ROW, FAILING_STEP = 128, 90, 6
CARD = "160MiB"


class Witness(TrainerCallback):
    """Counts optimizer steps, and how often each row was part of one."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.steps = 0
        self.rows: Counter[tuple[int, ...]] = Counter()
        self._pending: set[tuple[int, ...]] = set()
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            rows = zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True)
            self._pending |= {tuple(ids[: sum(mask)]) for ids, mask in rows}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget what an abandoned step has seen."""
        self._pending.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count the step and its rows."""
        self.steps += 1
        self.rows.update(self._pending)


@dataclass(frozen=True)
class Outcome:
    """What a training did."""

    steps: int
    final_steps: int
    batch: int
    rows_twice: int
    weights: dict[str, torch.Tensor]


def dataset() -> Dataset:
    """Rows of at most 64 tokens of real text, but one of 256."""
    ids = tiny.tokenizer()(list(tiny.texts())).input_ids
    rows = [list(row) for row in dict.fromkeys(tuple(row[:64]) for row in ids)][:ROWS]
    rows[LONG_ROW] = next(row[:256] for row in ids if len(row) >= 256)
    return Dataset.from_dict({"input_ids": rows})


def train(how: str, card: str) -> Outcome:
    """Train `"plain"`, with `"auto_find_batch_size"` or under `"oomguard"`."""
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = tiny.sft_trainer(
            Path(folder),
            dataset=dataset(),
            per_device_train_batch_size=8,
            max_steps=-1,
            num_train_epochs=1,
            max_length=256,
            learning_rate=1e-3,
            train_sampling_strategy="sequential",
            logging_strategy="no",
            auto_find_batch_size=how == "auto_find_batch_size",
        )
        witness = Witness(trainer.model)
        trainer.add_callback(witness)
        with VirtualCard(card) as virtual:
            virtual.track(trainer.model)
            if how == "oomguard":
                report = oomguard.fit(trainer, ladder="exact_first")
                rich.print(report)
            else:
                trainer.train()
    return Outcome(
        steps=witness.steps,
        final_steps=trainer.state.global_step,
        batch=trainer._train_batch_size * trainer.args.gradient_accumulation_steps,  # noqa: SLF001 - nothing else tells what auto_find_batch_size chose
        rows_twice=sum(1 for count in witness.rows.values() if count > 1),
        weights=tiny.weights(trainer),
    )


def main() -> None:
    """Run the three trainings and print the table."""
    logging.getLogger("oomguard").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    twin = train("plain", "1TiB")
    names = ("auto_find_batch_size", "oomguard")
    outcomes = [train(name, CARD) for name in names]
    table = Table("", *names, title=f"Out of memory in step {FAILING_STEP} of {twin.steps}")
    rows = {
        "optimizer steps made": lambda o: str(o.steps),
        "of which made again from the start": lambda o: str(o.steps - o.final_steps),
        "effective batch before, after": lambda o: f"{twin.batch}, {o.batch}",
        "rows trained on more than once": lambda o: f"{o.rows_twice} of {ROWS}",
        "largest difference of a weight from the twin": lambda o: (
            f"{tiny.largest_difference(o.weights, twin.weights):.1e}"
        ),
    }
    for label, show in rows.items():
        table.add_row(label, *(show(outcome) for outcome in outcomes))
    rich.print(table)


if __name__ == "__main__":
    main()
