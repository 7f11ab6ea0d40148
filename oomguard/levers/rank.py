"""Lower the rank of LoRA adapters by truncated SVD, and carry everything else over."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer

from oomguard.levers import moments
from oomguard.levers.activations import peft_model
from oomguard.levers.adapter import Adapter, inner_optimizer, trained
from oomguard.levers.residual import Residuals, takes_from_base
from oomguard.retry import off_card

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("oomguard")

_TINY = 1e-10  # singular values below this part of the largest carry nothing


def refusal(trainer: Any, rank: int, residuals: Residuals) -> str | None:
    """Why no adapter can be brought down to `rank`, or `None`."""
    optimizer = inner_optimizer(trainer)
    if optimizer is not None:
        reason = moments.refusal(optimizer)
        if reason is not None:
            return reason
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        return "load_best_model_at_end could not load a best checkpoint of another rank"
    seen: set[int] = set()
    for adapter in trained(trainer):
        if adapter.rank <= rank:
            continue
        reason = residuals.refusal(trainer, adapter) or _refuses(adapter)
        if reason is not None:
            return f"{adapter.path}: {reason}"
        factors = {id(p) for p in adapter.factors}
        if seen & factors:
            return f"{adapter.path}: its adapter shares weights with another module's"
        seen |= factors
    return None


def _refuses(adapter: Adapter) -> str | None:
    variant = adapter.layer.lora_variant.get(adapter.key)
    magnitude = adapter.layer.lora_magnitude_vector
    if variant is not None and not (
        adapter.key in magnitude and isinstance(magnitude[adapter.key], DoraLinearLayer)
    ):
        return f"LoRA variant {type(variant).__name__}"
    if any(factor.dim() != 2 for factor in adapter.factors):
        return "its factors are not matrices"
    if any(adapter.rank not in f.shape for f in adapter.factors):
        return "it holds the factors of several modules"
    return None


@torch.no_grad()
def lower(trainer: Any, rank: int, residuals: Residuals) -> dict[str, float]:
    """Bring every trained adapter with a larger rank down to `rank`, layer by layer.

    The weights stay the same `Parameter` objects, so that the optimizer goes on with them. All is
    computed on the host, so that the device holds one layer's new factors more at the most.

    Returns:
        By path of the module, how much of its adapter's product was lost: the Frobenius norm of the
        change over that of the product.
    """
    lost: dict[str, float] = {}
    optimizer = inner_optimizer(trainer)
    adapters = trained(trainer)
    for adapter in adapters:
        if adapter.rank > rank:
            lost[adapter.path] = _lower(adapter, rank, optimizer, residuals)
    for key in {adapter.key for adapter in adapters}:
        rewrite_config(trainer, key)
    if lost:
        logger.info(
            "lora_r lowered to %d in %d modules; the adapters' products changed by %.2g at most, "
            "%.2g on average (relative)",
            rank,
            len(lost),
            max(lost.values()),
            sum(lost.values()) / len(lost),
        )
    return lost


def _lower(adapter: Adapter, rank: int, optimizer: Any, residuals: Residuals) -> float:
    a, b = adapter.factors
    given = residuals.give_back(adapter, rank)
    with off_card():
        old_a, old_b = a.detach().cpu().double(), b.detach().cpu().double()
        whole_a, whole_b = old_a, old_b
        if given is not None:  # the base weight has it now
            whole_a = torch.cat([old_a, given[0]])
            whole_b = torch.cat([old_b, -given[1]], dim=1)
        outer, inner, lost = maps(whole_a, whole_b, rank)
        new_a, new_b = inner @ whole_a, whole_b @ outer
        if given is not None:  # the nearest there is to new_b = old_b @ outer, and so on
            outer = torch.linalg.lstsq(old_b, new_b).solution
            inner = torch.linalg.lstsq(old_a.T, new_a.T).solution.T
    # The gradient of the new A is outer^T times the old one's, that of the new B is the old one's
    # times inner^T: both factors of the product B @ outer @ inner @ A.
    _replace(optimizer, a, new_a, left=outer.T, right=None)
    _replace(optimizer, b, new_b, left=None, right=inner.T)
    set_rank(adapter, rank)
    return lost


def set_rank(adapter: Adapter, rank: int) -> None:
    """Tell PEFT's layer its new rank; the scaling stays, so alpha changes."""
    layer, key = adapter.layer, adapter.key
    # rsLoRA divides alpha by the root of the rank; not every PEFT keeps on the layer which it was.
    rooted = math.isclose(layer.lora_alpha[key], layer.scaling[key] * math.sqrt(layer.r[key]))
    alpha = layer.scaling[key] * (math.sqrt(rank) if rooted and layer.r[key] > 1 else rank)
    layer.r[key] = rank
    layer.lora_alpha[key] = int(alpha) if float(alpha).is_integer() else alpha
    if key in layer.lora_A:
        layer.lora_A[key].out_features = layer.lora_B[key].in_features = rank


def _replace(
    optimizer: Any, factor: Any, value: Tensor, *, left: Tensor | None, right: Tensor | None
) -> None:
    """Give `factor` its new value, and gradient and moments to match."""
    with off_card():
        gradient = None if factor.grad is None else factor.grad.cpu().double()
        if gradient is not None:
            gradient = gradient if left is None else left @ gradient
            gradient = gradient if right is None else gradient @ right
    old = None if optimizer is None else optimizer.state.pop(factor, None)
    host = moments.to_host(old) if old else None
    del old
    factor.grad = None
    factor.data = moments.put(value, factor)
    if gradient is not None:
        factor.grad = moments.put(gradient, factor)
    if host:
        moments.project(optimizer, factor, host, left, right)


def maps(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Maps to the best approximation of `b @ a` that has `rank`.

    Args:
        a: `(r, inputs)` in float64, and `b` `(outputs, r)`.
        b: See there.
        rank: Below `r`.

    Returns:
        `outer` of shape `(r, rank)` and `inner` of shape `(rank, r)` such that
        `b @ outer @ inner @ a` is the truncated SVD of `b @ a` (Eckart and Young, 1936), rows of
        `inner @ a` being as long as rows of `a` are on average, because Adam's steps are of one
        size; and the part of the Frobenius norm of `b @ a` that is lost.
    """
    r = a.shape[0]
    core_b = torch.linalg.qr(b, mode="r").R if b.shape[0] > r else b
    core_a = torch.linalg.qr(a.T, mode="r").R.T if a.shape[1] > r else a
    left, values, right = torch.linalg.svd(core_b @ core_a, full_matrices=False)
    alive = int((values[:rank] > values[0] * _TINY).sum()) if values[0] > 0 else 0
    outer, inner = a.new_zeros(r, rank), a.new_zeros(rank, r)
    if alive:
        root = values[:alive].sqrt()
        outer[:, :alive] = core_a @ right[:alive].T / root
        inner[:alive] = left[:, :alive].T @ core_b / root[:, None]
        scale = a.norm(dim=1).mean() / (inner[:alive] @ a).norm(dim=1)
        outer[:, :alive] /= scale
        inner[:alive] *= scale[:, None]
    if alive < rank:  # B has not learned that many directions yet: keep some of A for them
        free = _null_space(core_b)[: rank - alive]
        outer[:, alive : alive + len(free)] = free.T
        inner[alive : alive + len(free)] = free
    whole = float(values.norm())
    return outer, inner, float(values[rank:].norm()) / whole if whole > 0 else 0.0


def _null_space(b: Tensor) -> Tensor:
    """Orthonormal rows that `b` maps to 0."""
    if not b.any():
        return torch.eye(b.shape[1], dtype=b.dtype)
    _, values, right = torch.linalg.svd(b)
    null: Tensor = right[int((values > values[0] * _TINY).sum()) :]
    return null


def rewrite_config(trainer: Any, key: str) -> None:
    """Make the adapter's config build exactly the shapes and scalings that its layers have."""
    model = peft_model(trainer)
    # A copy: the object belongs to the user, who may build another model with it.
    config = model.peft_config[key] = copy.deepcopy(model.peft_config[key])
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if key in getattr(module, "r", {}) and key in getattr(module, "lora_alpha", {})
    }
    ranks = {path: layer.r[key] for path, layer in layers.items()}
    alphas = {path: layer.lora_alpha[key] for path, layer in layers.items()}
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {p: r for p, r in ranks.items() if r != config.r}
    config.alpha_pattern = {p: a for p, a in alphas.items() if a != config.lora_alpha}
    init = config.init_lora_weights
    if isinstance(init, str) and not takes_from_base(init):
        config.init_lora_weights = True  # another init may not exist at this rank
