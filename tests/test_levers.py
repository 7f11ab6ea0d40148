"""Levers on real trainers: they obey, or refuse by name, and leave the rest alone."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from oomguard.levers import activations, metrics
from oomguard.levers.live import Levers, read_plan
from oomguard.levers.merged_metrics import merged
from oomguard.levers.micro_batch import split
from oomguard.testing import VirtualCard
from tests import tiny
from tests.kinds import gpt2, make, masked_lm, seq2seq, sft, token_classes, window

if TYPE_CHECKING:
    from pathlib import Path


class Bag(nn.Module):
    """A model that is none of transformers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(512, 1)

    def forward(self, input_ids: Any, **_: Any) -> dict[str, Any]:
        return {"loss": self.words(input_ids).mean()}


class Uncheckpointed(tf.LlamaForCausalLM):
    supports_gradient_checkpointing = False


class Shell(tf.PreTrainedModel):
    """Says that it supports checkpointing, and has no layer that does."""

    config_class, supports_gradient_checkpointing = tf.LlamaConfig, True


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Bag, "Bag has no gradient_checkpointing_enable()"),
        (lambda: Uncheckpointed(tiny.config()), "Uncheckpointed does not support"),
        (lambda: Shell(tiny.config()), "Shell"),
        (tiny.llama, None),
    ],
)
def test_a_model_that_cannot_checkpoint_is_refused_by_name(
    tmp_path: Path, build: Any, reason: str | None
) -> None:
    found = activations.refusal(make(tmp_path, model=build()))
    assert found is None if reason is None else str(found).startswith(reason)


def flags(trainer: Any) -> set[bool]:
    return {layer.gradient_checkpointing for layer in trainer.model.model.layers}


@pytest.mark.parametrize("build", [make, gpt2, seq2seq, sft])
def test_checkpointing_a_live_model_needs_less_and_keeps_every_gradient(
    tmp_path: Path, build: Any
) -> None:
    trainer = build(tmp_path)
    batch, peaks, gradients = window(trainer).batches[0], [], []
    for checkpointed in (False, True):
        if checkpointed:
            activations.enable(trainer)
        assert read_plan(trainer).gradient_checkpointing is checkpointed
        trainer.model.train().zero_grad()
        torch.manual_seed(0)  # dropout draws the same masks then, in the recomputation too
        with VirtualCard("1 TiB") as card:
            trainer.compute_loss(trainer.model, dict(batch)).backward()
        peaks.append(card.peak_bytes)
        grads = trainer.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in grads if p.grad is not None})
    assert peaks[1] < peaks[0]
    assert tiny.largest_difference(*gradients) <= 1e-7


def test_checkpointing_that_args_ask_for_is_in_the_plan_before_training_begins(
    tmp_path: Path,
) -> None:
    assert read_plan(make(tmp_path, activation_checkpointing=True)).gradient_checkpointing
    assert not read_plan(make(tmp_path)).gradient_checkpointing


@tiny.needs_activation_checkpointing
def test_every_second_layer_is_not_yet_all_of_them(tmp_path: Path) -> None:
    asked = {"every_n_layers": 2}
    changes: dict[str, Any] = {"activation_checkpointing_kwargs": asked, "max_steps": 1}
    trainer = make(tmp_path, activation_checkpointing=True, **changes)
    assert not read_plan(trainer).gradient_checkpointing
    trainer.train()
    assert flags(trainer) == {False, True}
    assert not read_plan(trainer).gradient_checkpointing
    activations.enable(trainer)
    assert flags(trainer) == {True}
    assert read_plan(trainer).gradient_checkpointing


@pytest.mark.parametrize(
    "name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"]
)
@pytest.mark.parametrize("asked", [None, True])
def test_the_users_arguments_for_checkpointing_are_kept(
    tmp_path: Path, name: str, asked: bool | None
) -> None:
    changes: dict[str, Any] = {name: None if asked is None else {"use_reentrant": asked}}
    trainer = make(tmp_path, **changes)
    activations.enable(trainer)
    layer = trainer.model.model.layers[0]
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": bool(asked)}


def test_reentrant_checkpoints_of_a_frozen_model_pass_the_gradients_on(tmp_path: Path) -> None:
    kwargs = {"use_reentrant": True}
    gradients = []
    for checkpointed in (False, True):
        trainer: Any = sft(tmp_path, activation_checkpointing_kwargs=kwargs)
        if checkpointed:
            activations.enable(trainer)
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(window(trainer).batches[0])).backward()
        trained = trainer.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in trained if p.grad is not None})
    assert len(gradients[1]) > 10
    assert tiny.largest_difference(*gradients) <= 1e-7


@tiny.needs_activation_checkpointing
def test_checkpoints_that_the_user_keeps_on_the_host_stay_there(tmp_path: Path) -> None:
    asked = {"every_n_layers": 2, "offload": True}
    trainer = make(tmp_path, activation_checkpointing_kwargs=asked)
    activations.enable(trainer)
    assert trainer.model.model.layers[0]._gradient_checkpointing_func.func is not checkpoint


def test_checkpoints_of_a_training_on_the_host_cannot_be_offloaded(tmp_path: Path) -> None:
    trainer = make(tmp_path, activation_checkpointing=True)
    plan = read_plan(trainer)
    reason = Levers(trainer, None).refuses_start(plan, replace(plan, offload_activations=True))
    assert reason == "the training is on the host already"


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes})


def with_adapter() -> Any:
    model = tiny.llama()
    model.add_adapter(lora())
    return model


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora": None, "optim": "sgd"}, {"lora_r": None, "target_modules": None, "optim": "sgd"}),
        ({"lora": lora()}, {"lora_r": 4, "target_modules": ("q_proj", "v_proj")}),
        ({"lora": None, "model": with_adapter()}, {"lora_r": 4}),
        ({"lora": lora(target_modules=".*q_proj")}, {"target_modules": ("q_proj",)}),
        ({"lora": lora(rank_pattern={"v_proj": 8})}, {"lora_r": 8}),
    ],
)
def test_the_plan_is_what_the_trainer_follows(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    plan = read_plan(sft(tmp_path, max_length=64, **changes))
    known = {
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        **expected,
    }
    assert {name: getattr(plan, name) for name in known} == known
    assert (plan.effective_batch_size, plan.passes_per_step) == (8, 2)


def refusal(trainer: Any, **changes: Any) -> str | None:
    plan = read_plan(trainer)
    levers = Levers(trainer, trainer.compute_loss)
    return levers.refusal(plan, replace(plan, **changes), window(trainer), 0)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (masked_lm, "BertForMaskedLM"),
        (token_classes, "BertForTokenClassification"),
        (seq2seq, "T5ForConditionalGeneration"),
        pytest.param(
            lambda folder: seq2seq(folder, "max_length"),
            "T5ForConditionalGeneration",
        ),
        (make, None),
        (sft, None),
    ],
)
def test_rows_that_are_not_causal_text_are_not_shortened(
    tmp_path: Path, build: Any, name: str | None
) -> None:
    found = refusal(build(tmp_path), max_length=24, max_pass_tokens=96)
    assert found == (None if name is None else f"rows of a {name} are not causal text")


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"micro_batch_size": 2},
        {"sequence_mode": "truncate"},
    ],
)
def test_a_change_that_no_lever_makes_is_refused_by_its_name(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    names = ", ".join(sorted(changes))
    found = refusal(make(tmp_path), **changes)
    assert found == f"no lever changes {names} of a live trainer"


def test_marked_metrics_come_back_and_what_the_loop_adds_up_stays(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.model.train()
    trainer.recent, trainer.rows = deque([1], maxlen=2), [1, 2]
    undo, rows = metrics.mark(trainer), trainer.rows
    before = copy.deepcopy((trainer._metrics, trainer._total_train_tokens))
    trainer.compute_loss(trainer.model, dict(window(trainer).batches[0]))
    trainer.recent.append(2)
    trainer.rows.append(3)
    trainer.current_flos += 7
    assert (trainer._metrics, trainer._total_train_tokens) != before
    undo()
    assert (trainer._metrics, trainer._total_train_tokens) == before
    assert (trainer.recent, trainer.rows, trainer.current_flos) == (deque([1]), [1, 2], 7)
    assert trainer.rows is rows


def test_merged_metrics_of_passes_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parted = sft(tmp_path), sft(tmp_path)
    batch = window(whole).batches[0]
    passes = split(batch, 96)
    for trainer, parts in ((whole, [batch]), (parted, passes)):
        trainer.model.train()
        trainer._metrics["train"]["entropy"].append(3.0)
        entries = metrics.PassEntries(trainer)
        for part in parts:
            trainer.compute_loss(trainer.model, dict(part))
            entries.add(part)
        entries.replace(merged)
    found = dict(parted._metrics["train"])
    assert len(passes) == 4
    assert found == {
        name: pytest.approx(values, rel=1e-5) for name, values in whole._metrics["train"].items()
    }
