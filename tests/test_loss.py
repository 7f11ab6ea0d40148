"""How a trainer's loss is made up of parts: found out on real models, or refused by name."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from oomguard.levers import activations, loss
from oomguard.levers.batch import CannotActError
from oomguard.levers.live import Levers, read_plan
from oomguard.levers.micro_batch import split
from tests import tiny
from tests.kinds import (
    SMALL,
    gpt2,
    make,
    masked_lm,
    row_classes,
    seq2seq,
    sft,
    token_classes,
    window,
)

if TYPE_CHECKING:
    from pathlib import Path


def probe(trainer: Any) -> loss.SplitLoss:
    first = window(trainer)
    return loss.probe(trainer, trainer.compute_loss, first.batches[0], first.num_items)


def loss_of(trainer: Any, batch: dict[str, Any], num_items: Any) -> float:
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items))


def flat(folder: Path, use_cache: bool = False) -> Any:
    """Packed rows; the Trainer of transformers 5 turns the cache off by itself."""
    trainer = make(folder, collator=tf.DataCollatorWithFlattening())
    trainer.model.config.use_cache = use_cache
    return trainer


class WithoutNumItems(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **_: Any) -> Any:
        return super().compute_loss(model, inputs, *args)


class Summed(WithoutNumItems):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **_: Any) -> Any:
        targets = (inputs["labels"][:, 1:] != -100).sum()
        return super().compute_loss(model, inputs, *args) * targets


class Contrastive(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], output_hidden_states=True)
        texts = normalize(outputs.hidden_states[-1].mean(1), dim=1)
        return cross_entropy(10 * texts @ texts.T, torch.arange(len(texts)).roll(1))


FORMS: dict[str, tuple[Any, str]] = {
    "llama": (make, "sum"),
    "gpt2": (gpt2, "sum"),
    "sft": (sft, "sum"),
    "packed": (partial(sft, packing=True), "sum"),
    "flat": (flat, "sum"),
    "summed": (partial(make, trainer_class=Summed), "sum"),
    "no num_items": (partial(make, trainer_class=WithoutNumItems), "token"),
    "masked": (masked_lm, "unshifted token"),
    "token classes": (token_classes, "unshifted token"),
    "seq2seq": (seq2seq, "unshifted token"),
    "row classes": (row_classes, "row"),
}


@pytest.mark.parametrize(("build", "form"), FORMS.values(), ids=FORMS)
def test_the_probe_finds_the_form_by_which_parts_make_up_the_whole(
    tmp_path: Path, build: Any, form: str
) -> None:
    trainer = build(tmp_path)
    found, known = probe(trainer), window(trainer)
    assert found.form == form
    trainer.model.eval()
    passes = split(known.batches[1], 1)
    parts = [loss_of(trainer, part, known.num_items) for part in passes]
    weights = found.weights(passes) or [1] * len(passes)
    whole = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    assert whole == pytest.approx(loss_of(trainer, known.batches[1], known.num_items), rel=1e-5)


@pytest.mark.parametrize(("build", "form"), FORMS.values(), ids=FORMS)
def test_in_bfloat16_the_probe_finds_the_form_or_refuses_to_guess(
    tmp_path: Path, build: Any, form: str
) -> None:
    for seed in range(4):
        trainer = build(tmp_path)
        torch.manual_seed(seed)
        for weight in trainer.model.parameters():
            nn.init.normal_(weight, std=0.1)
        trainer.model.bfloat16()
        try:
            found = probe(trainer).form
        except CannotActError:
            found = "refused"
        assert found in ({form} if form in {"sum", "row"} else {form, "refused"})


def test_a_loss_that_ties_rows_to_each_other_is_refused_with_its_numbers(tmp_path: Path) -> None:
    trainer = make(tmp_path, Contrastive)
    number = r"-?[\d.e-]+"
    words = rf"two rows \({number}\) is neither .* of theirs \({number}, {number}\)"
    with pytest.raises(CannotActError, match=words):
        probe(trainer)


def test_one_row_is_too_little_to_probe_but_its_windows_are_not(tmp_path: Path) -> None:
    trainer = make(tmp_path, per_device_train_batch_size=1)
    with pytest.raises(CannotActError, match="a single row"):
        probe(trainer)
    plan, levers = read_plan(trainer), Levers(trainer, trainer.compute_loss)
    after = replace(plan, max_length=24, max_pass_tokens=24)
    assert levers.refusal(plan, after, window(trainer), 0) is None
    assert levers.split_loss is not None
    assert levers.split_loss.form == "sum"


def test_documents_that_see_each_other_are_neither_split_nor_checkpointed(tmp_path: Path) -> None:
    trainer = flat(tmp_path, use_cache=True)
    with pytest.raises(CannotActError, match="neither the sum"):
        probe(trainer)
    plan, levers = read_plan(trainer), Levers(trainer, trainer.compute_loss)
    after, known = replace(plan, gradient_checkpointing=True), window(trainer)
    assert "set use_cache=False" in str(levers.refusal(plan, after, known, 0))
    assert trainer.model.config.use_cache is True
    activations.enable(trainer)  # has no cache, so they do not see each other
    assert probe(trainer).form == "sum"
    trainer = flat(tmp_path, use_cache=False)
    assert Levers(trainer, trainer.compute_loss).refusal(plan, after, window(trainer), 0) is None


def mixtral(router: bool) -> Any:
    config = tf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    config.output_router_logits = router
    return tf.MixtralForCausalLM(config)


def normed(kind: type[nn.Module]) -> Any:
    model = tiny.llama()
    model.model.norm = kind(32)
    return model


class OwnSFT(SFTTrainer):
    pass


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda folder: make(folder, model=mixtral(True)), "output_router_logits"),
        (lambda folder: make(folder, model=mixtral(False)), None),
        (lambda folder: sft(folder, model=mixtral(True), lora=None), "output_router_logits"),
        (lambda folder: make(folder, model=normed(nn.BatchNorm1d)), "model.norm is a BatchNorm1d"),
        (lambda folder: make(folder, model=normed(nn.LayerNorm)), None),
        pytest.param(
            lambda folder: sft(folder, model=mixtral(False), lora=None),
            "output_router_logits",
            marks=tiny.needs(SFTConfig, "router_aux_loss_coef"),  # which TRL sets by itself
        ),
        (lambda folder: sft(folder, trainer_class=OwnSFT), None),
    ],
    ids=[
        *("moe", "moe without", "moe in sft", "batch norm", "layer norm"),
        *("moe by default in sft", "own sft"),
    ],
)
def test_a_loss_that_needs_whole_batches_is_refused_by_name(
    tmp_path: Path, build: Any, reason: str | None
) -> None:
    found = loss.refusal(build(tmp_path))
    assert found is None if reason is None else reason in str(found)


class Noisy(SFTTrainer):
    fails = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.fails:
            raise ValueError(random.random(), np.random.rand(), torch.rand(1))  # noqa: S311
        return super().compute_loss(*args, **kwargs) + 0 * torch.rand(1)[0]


def state_of(trainer: Any) -> tuple[Any, ...]:
    modes = [module.training for module in trainer.model.modules()]
    numbers = copy.deepcopy((trainer._metrics, trainer._total_train_tokens, modes))
    generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    return numbers, *generators[:2], generators[2].tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_the_probe_leaves_metrics_random_state_and_mode_alone(tmp_path: Path, fails: bool) -> None:
    trainer = sft(tmp_path, trainer_class=Noisy)
    first = window(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(first.batches[1]), num_items_in_batch=first.num_items)
    before, trainer.fails = state_of(trainer), fails
    try:
        loss.probe(trainer, trainer.compute_loss, first.batches[0], first.num_items)
    except ValueError:
        assert fails
    assert state_of(trainer) == before
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
