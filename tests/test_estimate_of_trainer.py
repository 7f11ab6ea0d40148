"""Estimates of live trainers that are not the plain case, and of cards that are measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from datasets import Dataset
from transformers import LlamaForTokenClassification, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer

import oomguard
from oomguard.errors import ConfigurationError
from oomguard.memory.cards import Card
from oomguard.prediction.predictor import Predictor
from oomguard.prediction.settings import Settings
from oomguard.prediction.trainer import settings_of
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path


def plain(tmp_path: Path, model: Any) -> Trainer:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
    return Trainer(model=model, args=args, train_dataset=rows)


def test_a_token_classifier_is_refused_by_name(tmp_path: Path) -> None:
    trainer = plain(tmp_path, LlamaForTokenClassification(tiny.config()))
    with pytest.raises(ConfigurationError, match="LlamaForTokenClassification has no language"):
        oomguard.estimate(trainer)


def test_a_step_that_is_not_sfts_is_a_closed_form_that_names_its_trainer(tmp_path: Path) -> None:
    words = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    trainer = DPOTrainer(
        model=tiny.llama(),
        ref_model=tiny.llama(),
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_dict(words),
        processing_class=tiny.tokenizer(),
    )
    found = oomguard.estimate(trainer)
    assert found.method == "closed form"
    assert "DPOTrainer" in found.notes[0]


def test_embeddings_that_require_gradients_are_seen_and_cost_memory(tmp_path: Path) -> None:
    model: Any = tiny.llama()
    assert settings_of(plain(tmp_path, model)).input_require_grads is None
    model.enable_input_require_grads()
    assert settings_of(plain(tmp_path, model)).input_require_grads is True
    plan = oomguard.Plan(lora_r=8, target_modules=("q_proj",), per_device_train_batch_size=2)
    with_them, without = (
        Predictor(model.config, Settings(trainer="trainer", input_require_grads=value)).at(plan)
        for value in (True, None)
    )
    assert with_them.peak_allocated_bytes > without.peak_allocated_bytes


def test_what_is_measured_of_a_card_stands_in_place_of_the_table() -> None:
    card = Card.measured("NVIDIA A10G", 20 * 2**30, 300 * 2**20)
    assert (card.capability, card.multiprocessors) == ((8, 6), 80)
    assert card.usable_bytes == 20 * 2**30 - (300 + 148) * 2**20
    assert card.context_measured
    other = Card.measured("NVIDIA Something", 10 * 2**30)
    assert (other.total_bytes, other.known, other.context_measured) == (10 * 2**30, False, False)
