"""From AdamW to bitsandbytes' paged 8-bit AdamW on a live trainer, moments included."""

from __future__ import annotations

import logging
import weakref
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers.training_args import OptimizerNames

from oomguard import oom
from oomguard.levers import moments, paging
from oomguard.levers.adapter import inner_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger("oomguard")

PAGED_8BIT = "paged_adamw_8bit"

_UNPAGED_8BIT = "adamw_8bit"
_ADAMW = (
    "adamw_torch",
    "adamw_torch_fused",
    "paged_adamw",
    "paged_adamw_32bit",
    "adamw_bnb_8bit",
    _UNPAGED_8BIT,
)
_KEPT = ("lr", "initial_lr", "betas", "eps", "weight_decay")
_TORCH = (torch.optim.Adam, torch.optim.AdamW)
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# In this order bitsandbytes and torch name the same two things.
_NAMES = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))


def optim_name(args: Any) -> str:
    """`TrainingArguments.optim` as users write it."""
    return str(getattr(args.optim, "value", args.optim))


def refusal(trainer: Any, optim: str | None) -> str | None:
    """Why the trainer's optimizer cannot become `optim`, or `None`."""
    if optim != PAGED_8BIT:
        return f"no optimizer is turned into {optim}"
    old = inner_optimizer(trainer)
    name = type(old).__name__
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if old is None:
        chosen = optim_name(trainer.args)
        return None if chosen in _ADAMW else f"optim={chosen!r} is not an AdamW"
    if moments.is_bitsandbytes(old):
        reason = _refuses_bitsandbytes(old)
    elif type(old) in _TORCH:
        reason = _refuses_torch(old)
    else:
        reason = f"{name} is not an Adam whose moments could be kept"
    if reason is not None:
        return reason
    strange = {str(p.dtype) for p in _parameters(old)} - {str(dtype) for dtype in _TYPES}
    return f"bitsandbytes has no weights in {', '.join(strange)}" if strange else None


def _refuses_torch(old: Any) -> str | None:
    for setting in ("amsgrad", "maximize", "differentiable"):
        if any(group.get(setting) for group in old.param_groups):
            return f"bitsandbytes has no {setting}"
    if isinstance(old, torch.optim.AdamW):
        return None
    coupled = any(
        g["weight_decay"] and not g.get("decoupled_weight_decay") for g in old.param_groups
    )
    return "Adam adds weight_decay to the gradient; bitsandbytes to the weight" if coupled else None


def _refuses_bitsandbytes(old: Any) -> str | None:
    if getattr(old, "optimizer_name", None) != "adam":
        return f"bitsandbytes {type(old).__name__} is not Adam"
    if old.args.max_unorm or old.args.skip_zeros:
        return "max_unorm and skip_zeros are not carried over"
    if old.args.optim_bits == 8 and (old.is_paged or not _on_device(old)):
        return "it has 8 bits already, and without CUDA nothing is paged"
    return None


@torch.no_grad()
def convert(trainer: Any) -> None:
    """Put a paged 8-bit AdamW into the place of the trainer's Adam.

    Learning rates, decay, step counts and parameter groups stay, and so does accelerate's wrapper,
    which scheduler and callbacks hold. One parameter after another gives its old moments away for
    its new ones, so that at most one of them has both. Weights of embeddings keep 32 bits, as the
    Trainer decides for its own 8-bit optimizers. Before there is an optimizer its name is set.
    """
    old = inner_optimizer(trainer)
    if old is None:
        trainer.args.optim = _name(paged=trainer.args.device.type == "cuda")
        return
    new = _build(old)
    _keep_embeddings(trainer, new)
    if moments.is_bitsandbytes(old):
        paging.own_all(old)
    for group_index, group in enumerate(new.param_groups):
        for index, parameter in enumerate(group["params"]):
            state = old.state.get(parameter)
            if state:
                make = partial(new.init_state, group, parameter, group_index, index)
                _carry_over(_with_room(make, state), new.state[parameter])
                del old.state[parameter]
    paging.own_all(new)
    _install(trainer, old, new)
    # A resumed or second training builds the optimizer by this name.
    trainer.args.optim = _name(paged=new.is_paged)


def _name(*, paged: bool) -> OptimizerNames:
    if not paged:
        logger.info("Without CUDA bitsandbytes pages nothing: the optimizer has 8 bits only.")
    return OptimizerNames(PAGED_8BIT if paged else _UNPAGED_8BIT)


def _build(old: Any) -> Any:
    from bitsandbytes.optim.adamw import AdamW

    groups = [
        {"params": list(group["params"]), **{k: _plain(group[k]) for k in _KEPT if k in group}}
        for group in old.param_groups
    ]
    defaults = {key: _plain(old.defaults[key]) for key in ("lr", "betas", "eps", "weight_decay")}
    new: Any = AdamW(groups, **defaults, optim_bits=8, is_paged=_on_device(old))
    new.initialized = True  # overrides are set here, and all state is where it belongs
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        getattr(new, hooks).update(getattr(old, hooks))
    return new


def _with_room(make: Callable[[], None], state: dict[str, Any]) -> dict[str, Any]:
    """Make the new state; without room beside the old one, that goes to the host first."""
    try:
        moments.retried(make)
    except torch.OutOfMemoryError as error:
        oom.caught(error)
    else:
        return state
    state.update(moments.to_host(state))
    moments.retried(make)
    return state


def _keep_embeddings(trainer: Any, new: Any) -> None:
    ours = {id(parameter) for parameter in _parameters(new)}
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Embedding) and id(module.weight) in ours:
            new.mng.override_config(module.weight, "optim_bits", 32)
            # The manager is a global one, and another weight may get the same id later.
            weakref.finalize(module.weight, new.mng.pid2config.pop, id(module.weight), None)


def _carry_over(old: dict[str, Any], new: dict[str, Any]) -> None:
    first, second = next(names for names in _NAMES if names[0] in old)
    new["step"] = int(old["step"])
    if old[first].dtype == torch.uint8 and new["state1"].dtype == torch.uint8:  # from unpaged
        for number in (1, 2):
            for key in (f"state{number}", f"absmax{number}", f"qmap{number}"):
                new[key].copy_(old[key])
    else:
        quantized = old[first].dtype == torch.uint8
        read = moments.read if quantized else dict.__getitem__
        moments.fill(new, read(old, first), read(old, second))


def _install(trainer: Any, old: Any, new: Any) -> None:
    wrapper, scheduler = trainer.optimizer, trainer.lr_scheduler
    if getattr(scheduler, "optimizer", None) is old:  # older Trainers do not give it the wrapper
        scheduler.optimizer = new
    if wrapper is old:
        trainer.optimizer = trainer.callback_handler.optimizer = new
        return
    wrapper.optimizer = new
    scaler = wrapper.scaler
    if scaler is not None:
        from accelerate.optimizer import patch_optimizer_step

        wrapper._optimizer_original_step_method = new.step
        wrapper._optimizer_patched_step_method = patch_optimizer_step(wrapper, new.step)
        states = scaler._per_optimizer_states
        if id(old) in states:  # gradients may be unscaled already
            states[id(new)] = states.pop(id(old))


def _parameters(optimizer: Any) -> Iterator[Any]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _on_device(optimizer: Any) -> bool:
    return any(parameter.is_cuda for parameter in _parameters(optimizer))


def _plain(value: Any) -> Any:
    """A setting that a capturable optimizer keeps as a tensor, as a number."""
    return float(value) if isinstance(value, torch.Tensor) else value
