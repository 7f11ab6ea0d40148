"""Everything that a trial could leave behind, as values that can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from bitsandbytes.functional import GlobalPageManager
from bitsandbytes.optim.optimizer import GlobalOptimManager

from oomguard import rng

if TYPE_CHECKING:
    from pathlib import Path

_PLAIN = (int, float, str, bool, type(None))


def of(trainer: Any, folder: Path) -> dict[str, Any]:
    """What there is of a trainer, of what it shares, and of the process; tensors are copied."""
    state = trainer.accelerator.gradient_state
    return {
        **{f"model.{key}": value for key, value in _model(trainer.model).items()},
        "attributes": {name: _shown(value) for name, value in vars(trainer).items()},
        "class": type(trainer),
        "args": {name: _shown(value) for name, value in vars(trainer.args).items()},
        "state": _shown(vars(trainer.state)),
        "callbacks": list(map(id, trainer.callback_handler.callbacks)),
        "optimizer": _shown(getattr(trainer.optimizer, "__dict__", None)),
        "schedule": _shown(getattr(trainer.lr_scheduler, "__dict__", None)),
        "data": _shown(getattr(trainer.train_dataset, "__dict__", None)),
        "collator": _shown(vars(trainer.data_collator)),
        "tokenizer": _shown(getattr(trainer.processing_class, "__dict__", {})),
        "accelerate": _shown(dict(vars(state))),
        "loaders": [*state.dataloader_references, state.active_dataloader],
        "accelerator": _shown(vars(trainer.accelerator)),
        "bitsandbytes": (
            _shown(vars(GlobalOptimManager.get_instance())),
            len(GlobalPageManager.get_instance().paged_tensors),
        ),
        "rng": rng.snapshot(),
        "files": sorted(str(path) for path in folder.rglob("*")),
    }


def _model(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"config": _shown(vars(model.config))}
    for name, module in model.named_modules():
        found[f"{name} attributes"] = {key: _shown(value) for key, value in vars(module).items()}
        for key, adapter in getattr(module, "peft_config", {}).items():
            found[f"{name} {key}"] = _shown(vars(adapter))
    for name, parameter in model.named_parameters():
        found[name] = (id(parameter), parameter.requires_grad, parameter.grad)
        found[f"{name} value"] = parameter.detach().clone()
    found |= {f"{name} value": buffer.clone() for name, buffer in model.named_buffers()}
    return found


def _shown(value: Any) -> Any:
    """Plain values and containers of them, and generators' states; else which object it is."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(inner) for inner in value]
    return id(value)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same."""
    names = one.keys() ^ other.keys()
    return sorted(
        {*names, *(key for key in one.keys() & other.keys() if not _same(one[key], other[key]))}
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    return bool(one == other)
