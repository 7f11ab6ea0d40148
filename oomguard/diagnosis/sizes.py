"""How large the parts of a training step are, in closed form.

A step has two moments at which memory can peak: when the gradient of the logits is computed, with
everything saved for backward; and, under checkpointing, when a layer has been recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from oomguard.diagnosis import weights as of_weights

if TYPE_CHECKING:
    from oomguard.diagnosis.setup import Dimensions, Setup

LOGIT_BYTES = 12
"""Per logit, at `cross_entropy`'s backward: its log-softmax, and the gradients of and by that, all
in float32 (`transformers.loss.loss_utils.ForCausalLMLoss` converts to it)."""


def layer_bytes_per_token(sizes: Dimensions, itemsize: int) -> int:
    """What autograd saves of one token in one decoder layer of Llama's kind.

    Two norms save their input in float32 and give their output to LoRA or trained weights;
    attention saves queries, keys, values and what it returns; the gated MLP saves both projections,
    the activation and the product. Llama-3-8B: 180 KiB, 5.6 MiB in 32 layers.
    """
    norms = 2 * (4 + itemsize) * sizes.hidden
    attention = 2 * itemsize * (sizes.heads + sizes.kv_heads) * sizes.head_dim
    return norms + attention + 4 * itemsize * sizes.intermediate


def mask_bytes(setup: Setup, rows: int, width: int) -> int:
    """What a mask of all pairs of tokens costs `sdpa`; other implementations have none, or always.

    Width x width booleans a row (`transformers.masking_utils`) for the whole step. In each layer
    that autograd saves, they are converted to the type of the queries (`convert_boolean_attn_mask`
    of PyTorch's `attention.cpp`), and keys and values are repeated for every head
    (`transformers.integrations.sdpa_attention.use_gqa_in_sdpa`).
    """
    sizes = setup.dimensions
    if sizes is None or setup.attention != "sdpa":
        return 0
    repeated = 2 * (sizes.heads - sizes.kv_heads) * sizes.head_dim * width
    layers = 1 if setup.checkpointing else sizes.layers
    return rows * (width**2 + layers * setup.itemsize * (width**2 + repeated))


def batch_bytes(setup: Setup, rows: int, width: int, *, masked: bool) -> int | None:
    """What a batch adds to the peak of a step; `None` for unknown sizes.

    Besides what is saved, that is the larger of the logits and what the backward of one MLP takes:
    the gradients of its two projections and of their product, and the layer itself if it is
    recomputed.
    """
    sizes = setup.dimensions
    if sizes is None:
        return None
    layer = layer_bytes_per_token(sizes, setup.itemsize)
    saved = sizes.layers * (setup.itemsize * sizes.hidden if setup.checkpointing else layer)
    logits = LOGIT_BYTES * sizes.vocab if setup.full_logits else 0
    backward = 3 * setup.itemsize * sizes.intermediate + (layer if setup.checkpointing else 0)
    mask = mask_bytes(setup, rows, width) if masked else 0
    return rows * width * (saved + max(logits, backward)) + mask


def resident_bytes(setup: Setup) -> int:
    """Weights, gradients and Adam's moments."""
    return sum(
        weight.nbytes
        + weight.trained * weight.nbytes
        + of_weights.state_bytes(weight, setup.moments_itemsize)
        for weight in setup.weights
    )
