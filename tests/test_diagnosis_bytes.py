"""What a finding costs is what a card measures with the pitfall and without it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import transformers as tf

import oomguard
from oomguard.testing import VirtualCard
from tests.setups import evaluating, half, plain, rows, sft, small
from tests.tiny import needs_fused_head

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[[Path], Any]


def heavy() -> Any:
    """A model of which weights make the peak."""
    return small(hidden_size=256, intermediate_size=1024)


def step(folder: Path, model: Any, **changes: Any) -> Any:
    """One step on few tokens."""
    data = [{"input_ids": row["input_ids"]} for row in rows(32, count=8)]
    return sft(folder, model, data=data, per_device_train_batch_size=1, **changes)


def attending(implementation: str) -> Any:
    model = half(small())
    model.set_attn_implementation(implementation)
    return model


def checkpointed(folder: Path, *arguments: Any, **changes: Any) -> Any:
    return plain(folder, *arguments, gradient_checkpointing=True, **changes)


def flat(folder: Path, width: int, documents: int, build: Any = plain) -> Any:
    """Batches of one row of so many documents of `width` tokens."""
    return build(
        folder,
        data=[{"input_ids": row["input_ids"]} for row in rows(width)],
        collator=tf.DataCollatorWithFlattening(),
        per_device_train_batch_size=documents,
    )


def cached(folder: Path, *, on: bool) -> Any:
    trainer = evaluating(plain(folder))
    trainer.model.config.use_cache = on
    return trainer


def judged(folder: Path, steps: int | None) -> Any:
    """An evaluation in batches of two whose logits a function gets."""
    model = half(small(vocab_size=512))
    changes = {"eval_accumulation_steps": steps, "per_device_eval_batch_size": 2}
    trainer = evaluating(plain(folder, model, **changes))
    trainer.compute_metrics = lambda _: {}
    return trainer


# With the pitfall, without it, and by how much the bytes may be off: exact for what is resident,
# less so for what saves activations, where kernels of a CPU keep other temporaries.
MEASURED: dict[str, tuple[str, Build, Build, float]] = {
    "frozen weights": (
        "float32_weights",
        lambda folder: step(folder, heavy()),
        lambda folder: step(folder, half(heavy())),
        0.1,
    ),
    "frozen weights and their copies": (
        "float32_weights",
        lambda folder: step(folder, heavy(), gradient_checkpointing=False),
        lambda folder: step(folder, half(heavy()), gradient_checkpointing=False),
        0.05,
    ),
    "trained weights": (
        "float32_weights",
        lambda folder: step(folder, heavy(), lora=None),
        lambda folder: step(folder, half(heavy()), lora=None),
        0.01,
    ),
    "moments": (
        "optimizer_state",
        lambda folder: step(folder, half(heavy()), lora=None),
        lambda folder: step(folder, half(heavy()), lora=None, optim="adamw_8bit"),
        0.01,
    ),
    "cache": ("use_cache", partial(cached, on=True), partial(cached, on=False), 0.01),
    "logits": (
        "full_logits",
        lambda folder: plain(folder, half(small(vocab_size=4096))),
        plain,
        0.1,
    ),
    "scores": (
        "eager_attention",
        lambda folder: plain(folder, attending("eager"), data=rows(256)),
        lambda folder: plain(folder, attending("sdpa"), data=rows(256)),
        0.15,
    ),
    "scores of checkpointed layers": (
        "eager_attention",
        lambda folder: checkpointed(folder, attending("eager"), data=rows(384)),
        lambda folder: checkpointed(folder, attending("sdpa"), data=rows(384)),
        0.15,
    ),
    "padding": (
        "padding_to_max_length",
        lambda folder: plain(folder, data=rows(64, 192)),
        lambda folder: plain(folder, data=rows(64)),
        0.15,
    ),
    "rows": (
        "batch_larger_than_needed",
        lambda folder: checkpointed(folder, per_device_train_batch_size=32),
        lambda folder: checkpointed(folder, per_device_train_batch_size=8),
        0.05,
    ),
    "mask": (
        "packing_without_aware_attention",
        partial(flat, width=32, documents=16),
        partial(flat, width=512, documents=1),
        0.15,
    ),
    "mask of checkpointed layers": (
        "packing_without_aware_attention",
        partial(flat, width=32, documents=16, build=checkpointed),
        partial(flat, width=512, documents=1, build=checkpointed),
        0.01,
    ),
    "evaluated logits": (
        "eval_accumulation_unset",
        partial(judged, steps=None),
        partial(judged, steps=1),
        0.1,
    ),
}
EVALUATED = {"use_cache", "eval_accumulation_unset"}


def peak(trainer: Any, *, evaluate: bool) -> int:
    """The most memory that one step, or one evaluation, takes."""
    with VirtualCard("8 GiB") as card:
        card.track(trainer.model)
        (trainer.evaluate if evaluate else trainer.train)()
    return card.peak_bytes


@needs_fused_head
@pytest.mark.parametrize("case", MEASURED)
def test_a_finding_costs_what_a_card_measures(case: str, tmp_path: Path) -> None:
    name, planted, clean, tolerance = MEASURED[case]
    trainer, evaluate = planted(tmp_path), name in EVALUATED
    (said,) = (f.bytes for f in oomguard.diagnose(trainer).findings if f.name == name)
    measured = peak(trainer, evaluate=evaluate) - peak(clean(tmp_path), evaluate=evaluate)
    assert said == pytest.approx(measured, rel=tolerance), f"said {said}, measured {measured}"
