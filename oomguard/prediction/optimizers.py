"""The optimizer that the Trainer would make, on fake tensors."""

from __future__ import annotations

import inspect
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from oomguard.errors import ConfigurationError
from oomguard.levers.adapter import inner_optimizer
from oomguard.levers.moments import is_bitsandbytes
from oomguard.levers.optimizer import optim_name
from oomguard.prediction.world import patched

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

# Elements of one chunk of multi_tensor_apply (kChunkSize of MultiTensorApply.cuh).
_CHUNK = 65536
# Below this many elements bitsandbytes pages nothing (Optimizer8bit.get_state_buffer).
_PAGED_FROM = 1e5


@dataclass(frozen=True)
class Own:
    """What a user gave a trainer for an optimizer.

    Attributes:
        cls: Its class.
        kwargs: What it is made with.
        grouped: Whether its parameters are in groups, which are then taken to be the Trainer's.
        optim: `TrainingArguments.optim`, in whose place it is.
    """

    cls: Any
    kwargs: dict[str, Any]
    grouped: bool
    optim: str

    @classmethod
    def of(cls, trainer: Any) -> Own | None:
        """That of a live trainer; `None` where `TrainingArguments.optim` decides."""
        optim, made = optim_name(trainer.args), inner_optimizer(trainer)
        given = getattr(trainer, "optimizer_cls_and_kwargs", None)
        if made is not None:
            return cls(type(made), _made_with(made), len(made.param_groups) > 1, optim)
        return None if given is None else cls(given[0], given[1], True, optim)


def _made_with(optimizer: Any) -> dict[str, Any]:
    """Arguments that make an optimizer like this one."""
    kept = dict(getattr(optimizer, "defaults", {}))
    if is_bitsandbytes(optimizer):
        kept |= {"is_paged": optimizer.is_paged}
        if "bit" not in type(optimizer).__name__:  # AdamW8bit takes no other number
            kept |= {"optim_bits": optimizer.args.optim_bits}
    names = inspect.signature(type(optimizer)).parameters
    return {name: value for name, value in kept.items() if name in names}


def create(model: nn.Module, args: Any, own: Own | None = None) -> Any:
    """What `Trainer.create_optimizer` makes, with its groups and overrides.

    Args:
        model: What is trained.
        args: See `arguments`.
        own: What the user gave in place of `args.optim`.

    Raises:
        ConfigurationError: There is no such optimizer, or its package is missing.
    """
    if own is not None and not own.grouped:
        return own.cls([p for p in model.parameters() if p.requires_grad], **own.kwargs)
    decay_names: Any = Trainer.get_decay_parameter_names
    stand_in = SimpleNamespace(
        model=model,
        args=args,
        optimizer=None,
        optimizer_cls_and_kwargs=None if own is None else (own.cls, dict(own.kwargs)),
        get_decay_parameter_names=partial(decay_names, None),
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
    )
    try:
        return Trainer.create_optimizer(stand_in)  # type: ignore[arg-type]
    except (ImportError, ValueError) as error:
        msg = f"optim={args.optim.value!r} cannot be made here: {error}"
        raise ConfigurationError(msg) from error


def use_foreach(optimizer: Any) -> None:
    """Step all parameters at once, as PyTorch's optimizers do by default on a card."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def arguments(optim: str) -> Any:
    """Training arguments by default, without the device that `TrainingArguments` sets up.

    Raises:
        ConfigurationError: There is no such optimizer.
    """
    if optim not in list(OptimizerNames):
        msg = f"optim={optim!r} is no optimizer of TrainingArguments, such as 'adamw_torch_fused'"
        raise ConfigurationError(msg)
    values = {
        field.name: None if field.default is MISSING else field.default
        for field in fields(TrainingArguments)
    }
    return SimpleNamespace(**{**values, "optim": OptimizerNames(optim), "learning_rate": 5e-5})


def norm_bytes(tensors: Iterable[torch.Tensor]) -> list[int]:
    """What `clip_grad_norm_` takes for a moment, once for every type of the gradients.

    foreach_tensor_norm_cuda (ForeachReduceOp.cu) keeps a float32 partial norm for every chunk of
    the largest tensor, of every tensor.

    Args:
        tensors: All gradients.
    """
    chunks: dict[torch.dtype, list[int]] = defaultdict(list)
    for tensor in tensors:
        chunks[tensor.dtype].append(-(-tensor.numel() // _CHUNK))
    return [4 * len(counts) * max(counts) for counts in chunks.values()]


@contextmanager
def on_card() -> Iterator[None]:
    """Bitsandbytes' optimizers as they allocate on a card: what is paged is not on it."""
    if find_spec("bitsandbytes") is None:
        yield
        return
    import bitsandbytes.functional as functional
    import bitsandbytes.optim.optimizer as base

    def state_buffer(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
        if not self.is_paged or p.numel() < _PAGED_FROM:
            return torch.zeros_like(p, dtype=dtype)
        return torch.empty(p.shape, dtype=dtype, device="meta")

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def maps(self: Any) -> None:
        for name in ("dynamic", "udynamic"):
            self.name2qmap[name] = torch.empty(256)

    with ExitStack() as stack:
        # Overrides of modules are kept in a global manager: not in that of the user.
        stack.enter_context(patched(base.GlobalOptimManager, _instance=None))
        stack.enter_context(
            patched(base.Optimizer8bit, get_state_buffer=state_buffer, fill_qmap=maps)
        )
        stack.enter_context(patched(base, sync_gpu=nothing))
        stack.enter_context(
            patched(
                functional,
                optimizer_update_8bit_blockwise=nothing,
                optimizer_update_32bit=nothing,
            )
        )
        yield
