"""Real trainers of every kind of loss, and a card whose memory runs short in one step."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
import transformers as tf
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import oomguard
from oomguard.levers.live import Window
from oomguard.testing import VirtualCard
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.report import Report

QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
}
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT = tf.BertConfig(**SMALL, pad_token_id=0)
BERT.num_labels = 3
MASKING = tf.PreTrainedTokenizerFast(
    tokenizer_object=tiny.tokenizer().backend_tokenizer, pad_token="<pad>", mask_token="<eos>"
)
causal = tf.DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)
# What a step's passes may use: enough if activations are recomputed; enough for half a batch; less
# than one row needs.
RECOMPUTED, HALF, NOTHING = 1800 * 1024, 1400 * 1024, 300 * 1024

logging.disable_progress_bar()
# Every recovery collects garbage. What the imports made stays anyway, and is a second a time.
gc.freeze()


def encoded(rows: int = 32, length: int = 48) -> list[dict[str, Any]]:
    return [dict(MASKING(text, truncation=True, max_length=length)) for text in tiny.texts()[:rows]]


def make(
    folder: Path,
    trainer_class: type[Trainer] = Trainer,
    *,
    model: Any = None,
    collator: Any = causal,
    rows: Any = None,
    **changes: Any,
) -> Any:
    """Three optimizer steps of 2 x 4 rows of 48 tokens, all weights trained."""
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
    return trainer_class(
        model=tiny.llama() if model is None else model,
        args=TrainingArguments(
            **tiny.as_named_here({"output_dir": str(folder), **values, **QUIET, **changes})
        ),
        train_dataset=encoded() if rows is None else rows,
        data_collator=collator,
    )


def window(trainer: Any) -> Window:
    """The batches of the trainer's first optimizer step."""
    batches = iter(trainer.get_train_dataloader())
    return Window(*trainer.get_batch_samples(batches, 2, trainer.args.device))


def seeded(model_class: Any, config: Any) -> Any:
    tf.set_seed(0)
    return model_class(config)


def masked_lm(folder: Path, **changes: Any) -> Any:
    collator = tf.DataCollatorForLanguageModeling(MASKING, mlm_probability=0.3, seed=5)
    return make(folder, model=seeded(tf.BertForMaskedLM, BERT), collator=collator, **changes)


def token_classes(folder: Path) -> Any:
    rows = [{**row, "labels": [i % 3 for i in row["input_ids"]]} for row in encoded()]
    collator = tf.DataCollatorForTokenClassification(MASKING)
    return make(
        folder, model=seeded(tf.BertForTokenClassification, BERT), collator=collator, rows=rows
    )


def row_classes(folder: Path) -> Any:
    rows = [{**row, "labels": index % 3} for index, row in enumerate(encoded())]
    model = seeded(tf.BertForSequenceClassification, BERT)
    return make(folder, model=model, collator=tf.DataCollatorWithPadding(MASKING), rows=rows)


def seq2seq(folder: Path, padding: Any = True) -> Any:
    config = tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    config.vocab_size, config.decoder_start_token_id = 512, 0
    model = seeded(tf.T5ForConditionalGeneration, config)
    pairs = zip(encoded(), encoded(64, 20)[32:], strict=True)
    rows = [{**row, "labels": other["input_ids"]} for row, other in pairs]
    collator = tf.DataCollatorForSeq2Seq(MASKING, padding=padding, max_length=48)
    return make(folder, model=model, collator=collator, rows=rows)


def gpt2(folder: Path) -> Any:
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1}
    config = tf.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, **ends)
    return make(folder, model=seeded(tf.GPT2LMHeadModel, config))


def sft(folder: Path, **changes: Any) -> Any:
    return tiny.sft_trainer(folder, **changes)


class Neighbour(TrainerCallback):
    """Takes the card's memory at an event of an optimizer step, all but `leave` bytes."""

    def __init__(self, card: VirtualCard, step: int, leave: int, event: str) -> None:
        self.card, self.step, self.leave = card, step, leave
        setattr(self, event, self.take)

    def take(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            self.held = torch.empty(2**30 - self.card.live_bytes - self.leave, dtype=torch.uint8)


def fit(
    trainer: Any, step: int = 2, leave: int = HALF, event: str = "on_step_begin", **arguments: Any
) -> Report:
    """`oomguard.fit` on a card whose memory is short from `event` of `step` on."""
    with VirtualCard("1 GiB") as card:
        card.track(trainer.model)
        trainer.add_callback(neighbour := Neighbour(card, step, leave, event))
        try:
            return oomguard.fit(trainer, **arguments)
        finally:
            trainer.remove_callback(neighbour)


def is_left_alone(trainer: Any, own_class: type[Trainer] = Trainer) -> bool:
    found = type(trainer)
    assert found is own_class
    assert not [name for name in vars(trainer) if "oomguard" in name]
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    assert not hasattr(trainer.optimizer.step, "_oomguard")
    loader = trainer.callback_handler.train_dataloader
    assert loader.device == trainer.args.device
    parts = (loader.collate_fn, loader.dataset, loader.base_dataloader.dataset)
    return not any(type(part).__module__.startswith("oomguard") for part in parts)
