"""Checks of what is around the training: evaluation, number types, the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from oomguard.diagnosis import weights as of_weights
from oomguard.diagnosis.finding import Finding

if TYPE_CHECKING:
    from oomguard.diagnosis.setup import Setup

_BF16_SINCE = (8, 0)  # Ampere, the first capability with bfloat16 in hardware


def eval_accumulation_unset(setup: Setup) -> Finding | None:
    """All logits of the evaluation set pile up on the device, for `compute_metrics`.

    Bytes: rows x longest row x vocabulary in the type of the logits, float32 under mixed precision
    (accelerate converts outputs), without those of one batch; twice where they are concatenated:
    the old and the new tensor are there at once (`Trainer.evaluation_loop`, `EvalLoopContainer`).
    """
    args, d, width = setup.args, setup.dimensions, setup.eval_width
    if not setup.metrics or setup.eval_rows is None or args.prediction_loss_only:
        return None
    if args.eval_accumulation_steps is not None or getattr(args, "batch_eval_metrics", False):
        return None
    cost = None
    if setup.causal and d is not None and width is not None:
        itemsize = 4 if args.bf16 or args.fp16 else setup.itemsize
        later = max(0, setup.eval_rows - args.per_device_eval_batch_size)
        copies = 2 if getattr(args, "eval_do_concat_batches", True) else 1
        cost = copies * later * width * d.vocab * itemsize
    return Finding(
        name="eval_accumulation_unset",
        what=f"compute_metrics gets the logits of all {setup.eval_rows} evaluation rows, which "
        "stay on the device until the last one",
        bytes=cost,
        current="eval_accumulation_steps=None",
        suggested="eval_accumulation_steps=1, or a preprocess_logits_for_metrics that keeps less",
    )


def fp16_instead_of_bf16(setup: Setup) -> Finding | None:
    """Half precision with a small range, on a device that has bfloat16.

    No bytes: both take two. fp16 overflows, needs a gradient scaler, and that float32 weights.
    """
    halves = [w for w in of_weights.base(setup.weights) if w.dtype == torch.float16 and w.matrix]
    machine = setup.machine
    if machine is not None and (machine.capability or _BF16_SINCE) < _BF16_SINCE:
        return None
    if setup.args.fp16:
        current, suggested = "fp16=True", "bf16=True"
    elif halves:
        current, suggested = "dtype=torch.float16", "dtype=torch.bfloat16"
    else:
        return None
    return Finding(
        name="fp16_instead_of_bf16",
        what="float16 overflows above 65504; bfloat16 has the range of float32 in the same memory",
        bytes=None,
        current=current,
        suggested=suggested,
    )


def expandable_segments_off(setup: Setup) -> Finding | None:
    """Batches of changing widths on an allocator with fixed segments: blocks that fit no more.

    No bytes: how much is lost depends on the order of the batches.
    """
    widths = {batch.width for batch in setup.batches if batch.documents is None}
    if setup.machine is None or setup.machine.expandable_segments is not False or len(widths) < 2:
        return None
    return Finding(
        name="expandable_segments_off",
        what=f"batches are {min(widths)} to {max(widths)} tokens wide, and segments of fixed size "
        "fragment under changing ones",
        bytes=None,
        current="PYTORCH_ALLOC_CONF=",
        suggested="PYTORCH_ALLOC_CONF=expandable_segments:True",
    )


def other_process(setup: Setup) -> Finding | None:
    """Another process holds memory of the device.

    Bytes: what the driver says it holds.
    """
    if setup.machine is None or not setup.machine.others_bytes:
        return None
    return Finding(
        name="other_process",
        what="another process holds memory of this device",
        bytes=setup.machine.others_bytes,
        current="nvidia-smi",
        suggested="end it, or CUDA_VISIBLE_DEVICES=<another device>",
    )
