"""Checks of the model and its optimizer: what its weights, attention and loss take too much of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from oomguard.diagnosis import sizes
from oomguard.diagnosis import weights as of_weights
from oomguard.diagnosis.finding import Finding
from oomguard.levers.optimizer import PAGED_8BIT, optim_name

if TYPE_CHECKING:
    from oomguard.diagnosis.setup import Setup
    from oomguard.diagnosis.weights import Weight

_HALF = (torch.bfloat16, torch.float16)
# Below this share of the model, weights in float32 are meant to be: norms, routers, scales.
_NEGLIGIBLE = 0.01


def float32_weights(setup: Setup) -> Finding | None:
    """Weights loaded in float32.

    Bytes: 2 for every such number, which bfloat16 would save; as many again for its gradient and
    twice as many for Adam's moments where it is trained (`weights.state_bytes`). Without
    checkpointing, autograd also keeps the copy of every frozen matrix that autocast makes: 2 more.
    Trained weights of an fp16 run are left out: its gradient scaler needs them in float32.
    """
    found = [w for w in _in_float32(setup) if not (w.trained and setup.args.fp16)]
    if setup.loaded_dtype in _HALF or not _matters(found, setup):
        return None
    autocast = bool(setup.args.bf16 or setup.args.fp16) and not setup.checkpointing
    saved = sum(
        2 * w.numel * (1 + w.trained)
        + (of_weights.state_bytes(w, setup.moments_itemsize) // 2 if _follows(setup) else 0)
        + 2 * w.numel * (autocast and w.matrix and not w.trained)
        for w in found
    )
    return Finding(
        name="float32_weights",
        what=f"{_count(found)} weights are in float32, twice what bfloat16 takes"
        + (", and so are their gradients" if any(w.trained for w in found) else ""),
        bytes=saved,
        current="dtype=torch.float32",
        suggested="dtype=torch.bfloat16  # of from_pretrained; in TRL, of model_init_kwargs",
    )


def _follows(setup: Setup) -> bool:
    """Whether moments take the type of their weight."""
    return setup.moments_itemsize == 0


def kbit_upcast(setup: Setup) -> Finding | None:
    """`prepare_model_for_kbit_training` has made float32 of what was loaded in 16 bits.

    Bytes: 2 for every such number. PEFT converts every parameter that is not quantized
    (`peft.utils.other`); in a model that is not quantized at all, those are all weights.
    """
    found = [weight for weight in _in_float32(setup) if not weight.trained]
    if setup.loaded_dtype not in _HALF or not _matters(found, setup):
        return None
    kind = str(setup.loaded_dtype).removeprefix("torch.")
    which = "embeddings and head" if setup.quantized else "all weights, for none is quantized"
    return Finding(
        name="kbit_upcast",
        what=f"{_count(found)} weights loaded in {kind} are in float32 now: "
        f"prepare_model_for_kbit_training converts {which}",
        bytes=sum(2 * weight.numel for weight in found),
        current="model = prepare_model_for_kbit_training(model)",
        suggested="model.requires_grad_(False)",
    )


def kbit_preparation_missing(setup: Setup) -> Finding | None:
    """Weights of a quantized base are trained along with its adapters.

    That is what `prepare_model_for_kbit_training` keeps from happening; PEFT's own wrapping does
    too. Bytes: the gradient and Adam's moments of each (`weights.state_bytes`).
    """
    found = [weight for weight in of_weights.base(setup.weights) if weight.trained]
    if not (setup.quantized and setup.peft and found):
        return None
    itemsize = setup.moments_itemsize
    return Finding(
        name="kbit_preparation_missing",
        what=f"{_count(found)} weights of the quantized base are trained besides the adapters, "
        f"as {found[0].name}",
        bytes=sum(weight.nbytes + of_weights.state_bytes(weight, itemsize) for weight in found),
        current="model = get_peft_model(model, lora_config)",
        suggested="model = get_peft_model(model.requires_grad_(False), lora_config)",
    )


def optimizer_state(setup: Setup) -> Finding | None:
    """Adam's moments of a full fine-tune are not in 8 bits.

    Bytes: those moments, two numbers a weight in its own type (torch) or in float32
    (bitsandbytes' 32-bit optimizers), less what they take in 8 bits
    (`Weight.eight_bit_state_bytes`).
    """
    if not setup.full_fine_tune or setup.moments_itemsize is None:
        return None
    trained = [weight for weight in setup.weights if weight.trained]
    now = sum(of_weights.state_bytes(weight, setup.moments_itemsize) for weight in trained)
    saved = now - sum(weight.eight_bit_state_bytes for weight in trained)
    if saved <= 0:
        return None
    each = now // sum(weight.numel for weight in trained)
    return Finding(
        name="optimizer_state",
        what=f"all weights are trained, and Adam's moments take {each} bytes for each; in 8 bits "
        "they take 2, and can be paged out",
        bytes=saved,
        current=f"optim='{optim_name(setup.args)}'",
        suggested=f"optim='{PAGED_8BIT}'",
    )


def use_cache(setup: Setup) -> Finding | None:
    """Forward keeps keys and values for a generation that does not follow.

    Bytes: the cache of one evaluation batch: 2 x layers x heads of keys and values x their width x
    tokens (`transformers.DynamicCache`). In training it is nothing: without checkpointing autograd
    saves the same tensors anyway, and checkpointed layers drop it.
    """
    if not setup.caches:
        return None
    d, width = setup.dimensions, setup.eval_width
    cached: int | None = 0
    if setup.eval_rows is not None:
        rows = min(setup.eval_rows, setup.args.per_device_eval_batch_size)
        tokens = None if width is None else rows * width
        cached = (
            None
            if d is None or tokens is None
            else 2 * d.layers * d.kv_heads * d.head_dim * tokens * setup.itemsize
        )
    return Finding(
        name="use_cache",
        what="keys and values of every layer are kept for generation, which costs memory while a "
        "batch is evaluated",
        bytes=cached,
        current="model.config.use_cache = True",
        suggested="model.config.use_cache = False",
    )


def lost_gradients(setup: Setup) -> Finding | None:
    """Reentrant checkpoints over frozen embeddings: no gradient reaches the adapters.

    No bytes: the training fails or learns nothing (`torch.utils.checkpoint`: one of the inputs
    must require a gradient).
    """
    if not setup.lost_gradients:
        return None
    return Finding(
        name="checkpointing_without_input_gradients",
        what="reentrant checkpointing passes gradients on only where its input asks for one, and "
        "frozen embeddings do not",
        bytes=None,
        current="gradient_checkpointing_kwargs={'use_reentrant': True}",
        suggested="gradient_checkpointing_kwargs={'use_reentrant': False}",
    )


def full_logits(setup: Setup) -> Finding | None:
    """The loss is computed from the logits of every token of the batch at once.

    Bytes: `sizes.LOGIT_BYTES` for every logit. Where another moment of the step is nearly as high,
    the peak falls by less.
    """
    batch, dimensions = setup.largest, setup.dimensions
    if not setup.full_logits or setup.generates:
        return None
    known = batch is not None and dimensions is not None
    wide = f" of {dimensions.vocab} numbers" if dimensions is not None else ""
    current, suggested = _logits_lines(setup)
    return Finding(
        name="full_logits",
        what=f"the logits{wide} of all tokens of a batch are held in float32, with their gradients",
        bytes=sizes.LOGIT_BYTES * batch.tokens * dimensions.vocab  # type: ignore[union-attr]
        if known
        else None,
        current=current,
        suggested=suggested,
    )


def _logits_lines(setup: Setup) -> tuple[str, str]:
    args = setup.args
    if setup.trl is None:
        return "use_liger_kernel=False", "use_liger_kernel=True, or TRL's SFTTrainer"
    if setup.trl == "SFTTrainer" and args.label_smoothing_factor > 0:
        smoothing = f"label_smoothing_factor={args.label_smoothing_factor}"
        return smoothing, "label_smoothing_factor=0.0"
    return "SFTTrainer(..., compute_loss_func=...)", "SFTTrainer(...)"


def eager_attention(setup: Setup) -> Finding | None:
    """Attention scores are written out, rows x heads x width x width of them.

    Bytes: 12 for each score of the layer whose backward runs (the float32 softmax, and the
    gradients of and by it), and without checkpointing, for each score of the other layers, what
    autograd saves: the float32 softmax and its copy in 16 bits
    (`eager_attention_forward` of transformers' modeling files).
    """
    batch, d = setup.largest, setup.dimensions
    if setup.attention != "eager" or setup.needs_eager:
        return None
    cost = None
    if batch is not None and d is not None:
        saved = 4 if setup.itemsize == 4 else 4 + setup.itemsize
        layers = 0 if setup.checkpointing else d.layers - 1
        cost = batch.rows * d.heads * batch.width**2 * (12 + layers * saved)
    return Finding(
        name="eager_attention",
        what="eager attention writes out the scores of all pairs of tokens, which grow with the "
        "square of the length",
        bytes=cost,
        current="from_pretrained(..., attn_implementation='eager')",
        suggested="from_pretrained(..., attn_implementation='sdpa')",
    )


def _in_float32(setup: Setup) -> list[Weight]:
    return [w for w in of_weights.base(setup.weights) if w.dtype == torch.float32]


def _matters(found: list[Weight], setup: Setup) -> bool:
    whole = sum(weight.nbytes for weight in setup.weights)
    return sum(weight.nbytes for weight in found) > _NEGLIGIBLE * whole


def _count(found: list[Weight]) -> str:
    numel = sum(weight.numel for weight in found)
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if numel >= size:
            return f"{numel / size:.1f} {unit}"
    return f"{numel:,}"
