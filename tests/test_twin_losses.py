"""Twin runs for every kind of batch and of loss."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from oomguard.testing import VirtualCard
from tests import tiny
from tests.twin import (
    CHECKPOINT,
    CLOSE,
    EXACT,
    SMALL,
    SPLIT,
    Build,
    Faults,
    assert_same,
    differences,
    run,
    sft,
    short_texts,
    twin,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ROWS = 20


def chats() -> Dataset:
    turns = [(text[:40], text[40:160]) for text in tiny.texts()[:ROWS]]
    messages = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        for ask, answer in turns
    ]
    return Dataset.from_dict({"messages": messages})


def tokens(kind: str) -> Dataset:
    """Token ids of texts, with labels per token, per row, of another length each, or without."""
    rows = []
    for index, text in enumerate(tiny.texts()[:ROWS]):
        ids = tiny.tokenizer()(text[:200])["input_ids"]
        labels = {"copy": ids, "class": index % 3, "next": ids[5 : 9 + index], "none": None}[kind]
        rows.append({"input_ids": ids} | ({} if labels is None else {"labels": labels}))
    return Dataset.from_list(rows)


class NoKeywordsLlama(LlamaForCausalLM):
    """Takes no `**kwargs`, so that the Trainer counts no items: a mean over each batch."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class SumLlama(LlamaForCausalLM):
    """Its loss is a plain sum over the targets."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return {"loss": loss, "logits": logits}


def plain(
    folder: Path,
    make: Callable[[], Any],
    kind: str = "copy",
    arguments: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Trainer:
    """A Trainer of transformers; `arguments` go to it, `changes` to its TrainingArguments."""
    set_seed(0)
    collator: Any = DataCollatorForSeq2Seq(tiny.tokenizer())
    if kind == "class":
        collator = DataCollatorWithPadding(tiny.tokenizer())
    elif kind == "none":
        masking = copy.deepcopy(tiny.tokenizer())
        masking.add_special_tokens({"mask_token": "<eos>"})
        collator = DataCollatorForLanguageModeling(masking, mlm_probability=0.3)
    trainer_class, args_class = (
        (Seq2SeqTrainer, Seq2SeqTrainingArguments)
        if kind == "next"
        else (Trainer, TrainingArguments)
    )
    return trainer_class(
        model=make(),
        args=args_class(str(folder), **tiny.as_named_here({**SMALL, **changes})),
        train_dataset=tokens(kind),
        data_collator=collator,
        processing_class=tiny.tokenizer(),
        **(arguments or {}),
    )


def llama(cls: type[LlamaForCausalLM] = LlamaForCausalLM) -> LlamaForCausalLM:
    return cls(tiny.config())


def t5() -> T5ForConditionalGeneration:
    values: dict[str, Any] = {
        "vocab_size": 512,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }
    return T5ForConditionalGeneration(T5Config(**values))


def own_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """What a user may pass as `compute_loss_func`."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


def streamed(folder: Path) -> Trainer:
    return sft(folder, dataset=short_texts().to_iterable_dataset())


def bert(cls: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    }
    return cls(BertConfig(**values))


EPOCHS: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3}
KINDS: dict[str, Build] = {
    "padded": sft,
    "full fine-tune": partial(sft, lora=None),
    "padding-free": partial(sft, padding_free=True, max_length=None),
    "packed bfd": partial(sft, packing=True, packing_strategy="bfd", per_device_train_batch_size=2),
    "packed wrapped": partial(sft, packing=True, packing_strategy="wrapped", max_length=48),
    "prompt-completion": partial(sft, dataset=tiny.prompt_dataset(ROWS)),
    "assistant-only": partial(sft, dataset=chats(), assistant_only_loss=True),
    "dft": partial(sft, loss_type="dft"),
    "label smoothing": partial(sft, label_smoothing_factor=0.1),
    "checkpointed from the start": partial(sft, activation_checkpointing=True),
    "no clipping": partial(sft, max_grad_norm=0.0),
    "one batch a step": partial(sft, gradient_accumulation_steps=1, max_steps=4),
    "all tokens seen": partial(sft, include_num_input_tokens_seen="all"),
    "tokens seen": partial(sft, include_num_input_tokens_seen="non_padding"),
    "streamed": streamed,
    "loader worker": partial(sft, dataloader_num_workers=1),
    "uneven last window": partial(sft, dataset=short_texts(18), **EPOCHS),
    "last batch dropped": partial(
        sft, dataset=short_texts(18), dataloader_drop_last=True, **EPOCHS
    ),
    "plain Trainer": partial(plain, make=llama),
    "plain Trainer, label smoothing": partial(plain, make=llama, label_smoothing_factor=0.1),
    "plain Trainer, uneven": partial(plain, make=llama, **EPOCHS),
    "no items counted": partial(plain, make=partial(llama, NoKeywordsLlama)),
    "no items counted, uneven": partial(plain, make=partial(llama, NoKeywordsLlama), **EPOCHS),
    "own loss function": partial(plain, make=llama, arguments={"compute_loss_func": own_loss}),
    "own sum": partial(plain, make=partial(llama, SumLlama)),
    "T5": partial(plain, make=t5, kind="next"),
    "BERT classification": partial(
        plain, make=partial(bert, BertForSequenceClassification), kind="class"
    ),
    "BERT masked": partial(plain, make=partial(bert, BertForMaskedLM), kind="none"),
}

# Of most trainings the second batch of the second step; of the others a batch of their odd step.
PLACES = {
    "one batch a step": 2,
    "uneven last window": 5,
    "plain Trainer, uneven": 5,
    "no items counted, uneven": 5,
}
# The decoder's layers add up the gradient of the encoder's output; recomputing them changes the
# order. The plain Trainer with activation_checkpointing=True differs from the one without as much.
ADDED_UP_IN_ANOTHER_ORDER = {"T5"}


def failing(kind: str) -> Faults:
    return {("backward", PLACES.get(kind, 4)): 12}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "checkpointed" not in kind])
def test_checkpointing_in_mid_step_leaves_every_bit_of_the_training_the_same(kind: str) -> None:
    recovered = run(KINDS[kind], CHECKPOINT, failing(kind))
    assert recovered.rungs == ["CheckpointActivations"]
    allowed = CLOSE if kind in ADDED_UP_IN_ANOTHER_ORDER else EXACT
    assert_same(recovered, twin(KINDS[kind]), allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_split_in_mid_step_trains_the_same_up_to_float_order(kind: str) -> None:
    recovered = run(KINDS[kind], SPLIT, failing(kind))
    assert recovered.rungs == ["SplitBatch"]
    assert len(recovered.passes) > len(twin(KINDS[kind]).passes) + 1
    assert_same(recovered, twin(KINDS[kind]), CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_split_after_any_of_ten_allocations_trains_the_same(kind: str) -> None:
    whole = VirtualCard(capacity_bytes="1GiB")
    run(KINDS[kind], card=whole)
    for fail_at in range(9, whole.allocations, whole.allocations // 10):
        recovered = run(KINDS[kind], SPLIT, card=VirtualCard(fail_at=fail_at))
        assert len(recovered.recoveries) == 1
        assert_same(recovered, twin(KINDS[kind]), CLOSE)


def test_where_checkpointing_changes_the_order_it_is_that_of_the_trainers_own() -> None:
    form: dict[str, Any] = {"activation_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointed = partial(plain, make=t5, kind="next", activation_checkpointing=True, **form)
    recovered = run(KINDS["T5"], CHECKPOINT, {("forward", 1): 1})
    assert_same(recovered, twin(checkpointed), EXACT)
    # In transformers 4 it keeps the order of a training without it.
    other = tiny.takes(TrainingArguments, "activation_checkpointing")
    assert bool(differences(recovered, twin(KINDS["T5"]))) is other
