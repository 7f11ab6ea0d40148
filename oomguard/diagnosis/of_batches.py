"""Checks of the batches: what is padded, packed, too many at once, or not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oomguard.diagnosis import sizes
from oomguard.diagnosis.finding import Finding

if TYPE_CHECKING:
    from oomguard.diagnosis.setup import Setup

SATURATED_TOKENS = 8192
"""Padded tokens of a pass from which on a larger one is hardly faster; also TRL's default batch, 8
rows of 1024."""
_DEFAULT_ROWS = 8  # of TrainingArguments
_WASTE = 0.1  # share of a row that padding may take before it counts


def padding_to_max_length(setup: Setup) -> Finding | None:
    """Every batch is padded to the same width, whatever is in it.

    Bytes: what a batch takes (`sizes.batch_bytes`), less what one as wide as the longest row would.
    Only rows that were looked at are known.
    """
    batches = [batch for batch in setup.batches if batch.documents is None]
    if len(batches) < 2 or len({batch.width for batch in batches}) > 1:
        return None
    width, longest = batches[0].width, max(batch.longest for batch in batches)
    empty = sum(batch.width - batch.longest for batch in batches) / len(batches)
    if empty < _WASTE * width:
        return None
    rows = max(batch.rows for batch in batches)
    ragged = any(batch.ragged for batch in batches)
    now = sizes.batch_bytes(setup, rows, width, masked=True)
    then = sizes.batch_bytes(setup, rows, longest, masked=ragged)
    return Finding(
        name="padding_to_max_length",
        what=f"every batch is padded to {width} tokens; the longest row that was looked at has "
        f"{longest}",
        bytes=None if now is None or then is None else now - then,
        current="tokenizer(..., padding='max_length')",
        suggested="tokenizer(...), and DataCollatorWithPadding or TRL's own collator",
    )


def packing_without_aware_attention(setup: Setup) -> Finding | None:
    """Documents share a row, and attention is told so by a mask of all pairs of its tokens.

    Bytes: that mask (`sizes.mask_bytes`). Eager attention has one anyway.
    """
    flat = [batch for batch in setup.batches if batch.documents is not None]
    wrapped = getattr(setup.args, "packing_strategy", None) == "wrapped"
    if getattr(setup.args, "packing", False) and wrapped:
        return Finding(
            name="packing_without_aware_attention",
            what="documents packed into one row see each other: this strategy does not tell "
            "attention where they end",
            bytes=None,
            current="packing_strategy='wrapped'",
            suggested="packing_strategy='bfd', attn_implementation='flash_attention_2'",
        )
    if not any(batch.documents > 1 for batch in flat if batch.documents is not None):
        return None
    name = setup.attention or ""
    if "flash" in name or name == "flex_attention":
        return None
    tokens = max(batch.tokens for batch in flat)
    return Finding(
        name="packing_without_aware_attention",
        what=f"documents of a row of {tokens} tokens are kept apart by a mask of {tokens} x "
        f"{tokens}, and every one pays for the whole row",
        bytes=sizes.mask_bytes(setup, 1, tokens) or None,
        current=f"attn_implementation='{name}'",
        suggested="attn_implementation='flash_attention_2'",
    )


def batch_larger_than_needed(setup: Setup) -> Finding | None:
    """More rows at once than speed needs, where accumulation gives the same effective batch.

    Needed are `SATURATED_TOKENS`, in at most as many rows as the default has. A batch of more rows
    is found if it takes more than all the rest, one of twice the tokens always. Bytes: what it
    takes (`sizes.batch_bytes`), less what the smaller one would.
    """
    batch, args = setup.largest, setup.args
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if batch is None or batch.documents is not None or setup.generates or batch.rows < rows:
        return None
    rows_each = batch.rows // rows  # two in a pair
    each = rows_each * batch.width
    fewer = max(
        n
        for n in range(1, rows + 1)
        if n == 1 or (rows % n == 0 and n <= _DEFAULT_ROWS and n * each <= SATURATED_TOKENS)
    )
    now, then = (
        sizes.batch_bytes(setup, n * rows_each, batch.width, masked=batch.ragged)
        for n in (rows, fewer)
    )
    dominates = now is not None and rows > _DEFAULT_ROWS and now > sizes.resident_bytes(setup)
    if fewer == rows or not (dominates or batch.tokens >= 2 * SATURATED_TOKENS):
        return None
    return Finding(
        name="batch_larger_than_needed",
        what=f"{batch.tokens} tokens go through the model at once; accumulated in parts, they give "
        f"the same effective batch of {rows * steps} rows a device",
        bytes=None if now is None or then is None else now - then,
        current=f"per_device_train_batch_size={rows}, gradient_accumulation_steps={steps}",
        suggested=f"per_device_train_batch_size={fewer}, "
        f"gradient_accumulation_steps={steps * rows // fewer}",
    )


def wrong_padding_side(setup: Setup) -> Finding | None:
    """Rows are padded on the left, as for generation: positions of trained tokens are shifted.

    No bytes: it costs quality. Trainers that sample their batches need it so.
    """
    if not setup.causal or setup.generates:
        return None
    if not any(batch.left_padded for batch in setup.batches):
        return None
    return Finding(
        name="wrong_padding_side",
        what="rows that are trained on begin with padding, which is for generation",
        bytes=None,
        current="tokenizer.padding_side = 'left'",
        suggested="tokenizer.padding_side = 'right'",
    )


def labels_missing(setup: Setup) -> Finding | None:
    """Batches have no labels, or labels that are all ignored.

    No bytes: there is no loss, or it is over nothing.
    """
    batches = setup.batches
    if batches and setup.own_loss and not any(batch.labels for batch in batches):
        return Finding(
            name="labels_missing",
            what=f"batches have no labels, so that {setup.model} returns no loss",
            bytes=None,
            current="Trainer(..., data_collator=...)",
            suggested="Trainer(..., data_collator=DataCollatorForLanguageModeling(tokenizer, "
            "mlm=False))",
        )
    if batches and all(batch.targets == 0 for batch in batches):
        length = getattr(setup.args, "max_length", None)
        return Finding(
            name="labels_missing",
            what="no token of the batches that were looked at is trained on: all labels are -100",
            bytes=None,
            current="labels=[-100, ...]" if length is None else f"max_length={length}",
            suggested="labels of the tokens to learn"
            if length is None
            else "max_length=None, or rows whose completions are within it",
        )
    return None
