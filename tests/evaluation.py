"""Trainers of every kind that evaluate, and a device that runs out of memory below the guard."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from oomguard.levers.batch import measure
from oomguard.testing import VirtualCard
from tests import kinds, tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from oomguard.report import Report

ROWS = 20  # two batches of 8 rows and one of 4
EVALUATED: dict[str, Any] = {"per_device_eval_batch_size": 8}
CLOCK = ("_runtime", "_per_second", "_preparation_time")
# TRL warns whoever asks for logits, and that is one of oomguard's frames here.
logits_are_asked_for = pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")


def accuracy(prediction: Any) -> dict[str, float]:
    """Depends on every logit, on their order, and on the labels beside them."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    labels = prediction.label_ids
    weight = np.arange(labels.size).reshape(labels.shape) / labels.size
    if logits.ndim > labels.ndim:
        return {"weighted": float(((logits.max(-1) + labels) * weight).mean())}
    return {"weighted": float((logits[:, : labels.shape[1]] * weight).mean())}


class Device:
    """What a device can evaluate; not kept on the trainer, whose numbers are put back.

    Attributes:
        most: Rows, or documents of a packed row, that it holds at once.
        failing: Numbers of calls that fail whatever they hold, counted from 1.
        at: Which allocation of a call fails.
        met: How many calls have failed.
    """

    def __init__(self, most: int, failing: tuple[int, ...] = ()) -> None:
        self.most, self.failing, self.at = most, failing, 20
        self.calls = self.met = 0

    def fails(self, inputs: Any) -> bool:
        self.calls += 1
        shape = measure(inputs)
        short = self.calls in self.failing or (shape is not None and shape.units > self.most)
        self.met += short
        return short


class Short(Trainer):
    """Below the guard: evaluates on a `Device`."""

    device: Device

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with VirtualCard(fail_at=self.device.at if self.device.fails(inputs) else 10**9):
            return super().prediction_step(model, inputs, *args, **kwargs)


def shorten(trainer: Any, most: int, *failing: int) -> Any:
    own = type(trainer)
    trainer.__class__ = type(own.__name__, (Short, own), {})
    trainer.device = Device(most, failing)
    return trainer


def causal_lm(folder: Path, **changes: Any) -> Any:
    trainer = kinds.make(folder, **{**EVALUATED, **changes})
    trainer.eval_dataset = kinds.encoded(ROWS)
    trainer.compute_metrics = accuracy
    return trainer


def with_metrics(make: Callable[..., Any], folder: Path) -> Any:
    trainer = make(folder)
    trainer.args.per_device_eval_batch_size = 8
    trainer.eval_dataset = trainer.train_dataset[:ROWS]
    trainer.compute_metrics = accuracy
    return trainer


def masked_lm(folder: Path) -> Any:
    # Of the seed alone: which tokens are masked must not depend on what ran before.
    return with_metrics(kinds.masked_lm, folder)


def summarizer(folder: Path, **changes: Any) -> Any:
    base = kinds.seq2seq(folder)
    values = {"output_dir": str(folder), **EVALUATED, **kinds.QUIET, "generation_max_length": 24}
    args = Seq2SeqTrainingArguments(**{**values, "predict_with_generate": True, **changes})
    return Seq2SeqTrainer(
        model=base.model,
        args=args,
        train_dataset=base.train_dataset,
        eval_dataset=base.train_dataset[:ROWS],
        data_collator=base.data_collator,
        processing_class=kinds.MASKING,
        compute_metrics=accuracy,
    )


def sft_rows(folder: Path, **changes: Any) -> Any:
    arguments = {"eval_dataset": tiny.text_dataset(ROWS), **changes.pop("trainer_arguments", {})}
    return tiny.sft_trainer(folder, trainer_arguments=arguments, **{**EVALUATED, **changes})


KINDS: dict[str, Callable[[Path], Any]] = {
    "causal": causal_lm,
    "causal, smoothed": partial(causal_lm, label_smoothing_factor=0.1),
    "causal, gathered on the CPU": partial(causal_lm, eval_accumulation_steps=1),
    "causal, loss only": partial(causal_lm, prediction_loss_only=True),
    "causal, losses and inputs": partial(causal_lm, include_for_metrics=["loss", "inputs"]),
    "masked": masked_lm,
    "tokens": partial(with_metrics, kinds.token_classes),
    "rows": partial(with_metrics, kinds.row_classes),
    "encoder-decoder": partial(with_metrics, kinds.seq2seq),
    "generated": summarizer,
    "generated in a loop": partial(summarizer, num_train_epochs=2),
    "SFT": sft_rows,
    "SFT with logits": partial(sft_rows, trainer_arguments={"compute_metrics": accuracy}),
    "SFT, padding-free": partial(sft_rows, padding_free=True, max_length=None),
    "SFT, packed": partial(sft_rows, packing=True, eval_packing=True, max_length=256),
}


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith(CLOCK)}


def assert_close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    off = {
        key: value
        for key, value in found.items()
        if not math.isclose(value, expected[key], rel_tol=2e-6, abs_tol=1e-6)
    }
    assert not off, {key: (value, expected[key]) for key, value in off.items()}


def changes(report: Report) -> list[str | None]:
    assert report.plan == report.initial_plan
    return [recovery.change for recovery in report.recoveries]
