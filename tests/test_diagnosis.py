"""Every pitfall is found where it is, and nowhere else."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model, prepare_model_for_kbit_training
from rich.console import Console

import oomguard
from oomguard.diagnosis import of_run, setup
from oomguard.diagnosis.diagnose import CHECKS
from oomguard.errors import UnsupportedTrainerError
from tests import tiny
from tests.setups import dpo, evaluating, half, load, load_4bit, plain, qlora, rows, saved, sft

if TYPE_CHECKING:
    from collections.abc import Callable


def names(trainer: Any) -> list[str]:
    return [finding.name for finding in oomguard.diagnose(trainer).findings]


@tiny.needs_fused_head
@pytest.mark.parametrize("build", [sft, qlora, dpo])
def test_nothing_is_found_in_trl_as_it_is_by_default(build: Any, tmp_path: Path) -> None:
    assert names(build(tmp_path)) == []


@tiny.needs_fused_head
def test_a_full_fine_tune_in_bfloat16_has_only_moments_that_could_be_smaller(
    tmp_path: Path,
) -> None:
    assert names(sft(tmp_path, lora=None)) == ["optimizer_state"]
    assert names(sft(tmp_path, lora=None, optim="adamw_8bit")) == []


@tiny.needs_fused_head
def test_trl_loads_a_path_in_float32(tmp_path: Path) -> None:
    assert names(sft(tmp_path, saved())) == ["float32_weights"]
    assert names(sft(tmp_path, saved(), model_init_kwargs={"dtype": "bfloat16"})) == []


def prepared(folder: Path, model: Any) -> Any:
    return sft(folder, prepare_model_for_kbit_training(model))


def embeddings_trained(folder: Path) -> Any:
    model: Any = get_peft_model(load_4bit(), copy.deepcopy(tiny.LORA))
    model.get_input_embeddings().weight.requires_grad_(True)
    return sft(folder, model, lora=None)


def reentrant(folder: Path) -> Any:
    trainer: Any = sft(folder, gradient_checkpointing=False)
    model = trainer.model.get_base_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    return trainer


def cached(folder: Path) -> Any:
    trainer = plain(folder)
    trainer.model.config.use_cache = True
    return trainer


def evaluated(folder: Path, steps: int | None = None) -> Any:
    trainer = sft(folder, eval_accumulation_steps=steps, own={"compute_metrics": lambda _: {}})
    return evaluating(trainer)


def padded(folder: Path, side: str) -> Any:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.padding_side = side
    collator = tf.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    encoded = [dict(tokenizer(text, truncation=True, max_length=48)) for text in tiny.texts()[:32]]
    return plain(folder, half(tiny.llama()), data=encoded, collator=collator)


def without_labels(folder: Path) -> Any:
    kept = ("input_ids", "attention_mask")
    return plain(folder, data=[{key: row[key] for key in kept} for row in rows(64)])


PLANTED: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "float32_weights": (lambda folder: sft(folder, load(dtype=torch.float32)), sft),
    "kbit_upcast": (
        lambda folder: sft(folder, prepare_model_for_kbit_training(load_4bit())),
        qlora,
    ),
    "kbit_upcast of a model that is not quantized": (
        lambda folder: sft(folder, prepare_model_for_kbit_training(load())),
        sft,
    ),
    "kbit_preparation_missing": (embeddings_trained, qlora),
    "optimizer_state": (
        lambda folder: sft(folder, lora=None, optim="paged_adamw_32bit"),
        lambda folder: sft(folder, lora=None, optim="paged_adamw_8bit"),
    ),
    "use_cache": (cached, plain),
    "checkpointing_without_input_gradients": (reentrant, sft),
    "full_logits": (lambda folder: sft(folder, label_smoothing_factor=0.1), sft),
    "eager_attention": (lambda folder: sft(folder, load(attn_implementation="eager")), sft),
    "padding_to_max_length": (
        lambda folder: plain(folder, data=rows(64, 128)),
        lambda folder: plain(folder, data=rows(128)),
    ),
    "packing_without_aware_attention": (lambda folder: sft(folder, packing=True), sft),
    "packing_without_aware_attention, wrapped": (
        lambda folder: sft(folder, packing=True, packing_strategy="wrapped"),
        sft,
    ),
    "batch_larger_than_needed": (
        lambda folder: sft(folder, per_device_train_batch_size=32),
        lambda folder: sft(folder, gradient_accumulation_steps=4),
    ),
    "wrong_padding_side": (partial(padded, side="left"), partial(padded, side="right")),
    "labels_missing": (without_labels, plain),
    "labels_missing, all ignored": (
        lambda folder: plain(folder, data=[{**row, "labels": [-100] * 64} for row in rows(64)]),
        plain,
    ),
    "eval_accumulation_unset": (evaluated, partial(evaluated, steps=4)),
    "fp16_instead_of_bf16": (lambda folder: sft(folder, fp16=True), sft),
}


def pitfall_of(case: str) -> str:
    return case.replace(",", "").split()[0]


@tiny.needs_fused_head
@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_pitfall_is_the_one_that_is_found(case: str, tmp_path: Path) -> None:
    planted, clean = PLANTED[case]
    found, there_anyway = names(planted(tmp_path)), names(clean(tmp_path))
    assert [name for name in found if name not in there_anyway] == [pitfall_of(case)]
    assert set(there_anyway) <= set(found)


def test_every_check_is_planted_or_asks_the_device() -> None:
    asks = {of_run.expandable_segments_off, of_run.other_process}
    assert len({pitfall_of(case) for case in PLANTED}) == len(set(CHECKS) - asks)


@tiny.needs_fused_head
def test_what_the_device_says_is_judged(tmp_path: Path) -> None:
    known = setup.read(sft(tmp_path, fp16=True))
    assert known.machine is None
    a100 = setup.Machine((8, 0), expandable_segments=False, others_bytes=2**30)
    t4 = setup.Machine((7, 5), expandable_segments=True, others_bytes=0)

    def found(machine: setup.Machine, **changes: Any) -> dict[str, int | None]:
        there = replace(known, machine=machine, **changes)
        return {f.name: f.bytes for check in CHECKS if (f := check(there)) is not None}

    assert found(a100) == {
        "fp16_instead_of_bf16": None,
        "expandable_segments_off": None,
        "other_process": 2**30,
    }
    assert found(t4) == {}
    equal = tuple(replace(batch, width=96) for batch in known.batches)
    assert "expandable_segments_off" not in found(a100, batches=equal)


@tiny.needs_fused_head
def test_what_is_set_and_not_in_force_is_not_found(tmp_path: Path) -> None:
    """A tokenizer's side that TRL's collator does not ask for; a cache that TRL switches off."""
    trainer: Any = sft(tmp_path)
    trainer.processing_class = copy.deepcopy(tiny.tokenizer())
    trainer.processing_class.padding_side = "left"
    trainer.model.config.use_cache = True
    assert names(trainer) == []


@tiny.needs_fused_head
def test_rows_that_stream_are_not_taken(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            pytest.fail("a row was taken")

    trainer: Any = sft(tmp_path)
    trainer.train_dataset = Stream()
    assert names(trainer) == []


@tiny.needs_fused_head
def test_the_dearest_comes_first_and_the_unknown_last(tmp_path: Path) -> None:
    model = load(dtype=torch.float32, attn_implementation="eager")
    found = oomguard.diagnose(sft(tmp_path, model, fp16=True)).findings
    sizes = [finding.bytes for finding in found]
    known = [size for size in sizes if size is not None]
    assert len(known) == 2
    assert sizes == [*sorted(known, reverse=True), None]


@tiny.needs_fused_head
def test_a_diagnosis_is_shown_and_written(tmp_path: Path) -> None:
    found = oomguard.diagnose(sft(tmp_path, load(attn_implementation="eager")))
    assert json.loads(json.dumps(found.to_dict())) == {
        "schema": "oomguard.diagnosis/1",
        "trainer": "SFTTrainer",
        "findings": [finding.to_dict() for finding in found.findings],
    }
    with Path(tmp_path, "shown").open("w") as file:
        console = Console(width=100, record=True, file=file)
        console.print(found)
        shown = console.export_text()
        for part in ("SFTTrainer: 1 memory pitfall", "eager_attention", "'sdpa'", "MiB"):
            assert part in shown
        console.print(oomguard.diagnose(sft(tmp_path)))
        assert "no memory pitfall found" in console.export_text()


def test_diagnosing_changes_nothing_of_the_training(tmp_path: Path) -> None:
    def collate(batch: list[Any]) -> Any:
        torch.rand(1)
        return tf.default_data_collator(batch)

    trainer, twin = (plain(tmp_path, collator=collate) for _ in range(2))
    state, attributes = torch.get_rng_state(), set(vars(trainer))
    oomguard.diagnose(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(trainer)) == attributes
    for one in (trainer, twin):
        torch.manual_seed(1)
        one.train()
    assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(twin)) == 0.0


def test_what_is_no_trainer_is_refused() -> None:
    not_one: Any = tiny.llama()
    with pytest.raises(UnsupportedTrainerError, match="needs a transformers Trainer"):
        oomguard.diagnose(not_one)
