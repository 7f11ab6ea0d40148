"""What a trace holds on to: which layer runs, what a weight consists of, who asks for the loss."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from oomguard.prediction.losses import shifted
from oomguard.prediction.subject import text_config

if TYPE_CHECKING:
    from oomguard.prediction.losses import Loss
    from oomguard.prediction.recorder import Recorder


@dataclass
class Enter:
    """A layer begins."""

    recorder: Recorder
    unit: int

    def __call__(self, module: Any, inputs: Any) -> None:
        """A forward pre-hook."""
        self.recorder.layer = self.unit


@dataclass
class Leave:
    """A layer ends; in backward, its gradient arrives."""

    recorder: Recorder
    unit: int

    def __call__(self, module: Any, inputs: Any, out: Any) -> None:
        """A forward hook."""
        self.recorder.layer = None
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(self._arrived)

    def _arrived(self, grad: Any) -> None:
        self.recorder.layer = self.unit
        self.recorder.in_head = False


@dataclass
class Head:
    """The backbone ends, and the language-model head begins."""

    recorder: Recorder

    def __call__(self, module: Any, inputs: Any, out: Any) -> None:
        """A forward hook."""
        self.recorder.in_head = True


def quantization_tensors(module: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a weight."""
    state = getattr(module, "quant_state", None)
    found = [getattr(getattr(module, "state", None), name, None) for name in ("CB", "SCB")]
    while state is not None:
        found += [state.absmax, state.code, getattr(state, "offset", None)]
        state = getattr(state, "state2", None)
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def inherit(recorder: Recorder, first: int) -> None:
    """What PEFT made on the way to an adapter belongs to that adapter's layer."""
    layer = None
    for number in range(len(recorder.nbytes) - 1, first - 1, -1):
        if recorder.home[number] is None:
            recorder.home[number] = layer
        else:
            layer = recorder.home[number]


def sft_stand_in(model: Any, config: Any, loss: Loss) -> Any:
    """What `SFTTrainer.compute_loss` asks of its trainer."""
    accelerator = SimpleNamespace(
        gather_for_metrics=lambda value: value, parallelism_config=None, num_processes=1
    )
    return SimpleNamespace(
        model=model,
        accelerator=accelerator,
        args=SimpleNamespace(loss_type=loss.loss_type, average_tokens_across_devices=True),
        aux_loss_enabled=getattr(text_config(config), "output_router_logits", False),
        router_aux_loss_coef=getattr(text_config(config), "router_aux_loss_coef", 0.0),
        compute_loss_func=None if loss.own is None else shifted,
        label_smoother=loss.smoother,
        current_gradient_accumulation_steps=1,
        get_tp_size=lambda: 1,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
