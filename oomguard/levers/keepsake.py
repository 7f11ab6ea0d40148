"""What a training may change of a live trainer and of what it shares, to be put back exactly."""

from __future__ import annotations

import random
from collections import deque
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from oomguard import rng
from oomguard.levers import paging
from oomguard.levers.adapter import inner_optimizer
from oomguard.retry import again, off_card, release_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LARGEST = 100_000  # entries of a container that is state; what is larger is data
_TRIES = 8  # to get back memory that was there before
_CONTAINERS = (dict, list, set, deque)
_GENERATORS = (torch.Generator, np.random.Generator, random.Random)


class Keepsake:
    """Remembers a trainer's model and all that its training shares with other trainings.

    Remembered are the values of trained weights and of buffers, in the host's memory; gradients;
    which parameters are trained; modes, hooks and every other attribute of the modules; their
    configs; collator, tokenizer, the optimizer and schedule that the user made; accelerate's state
    of the process; bitsandbytes' lists of overrides and of paged memory; random numbers, those of
    collators and data sets too. Frozen weights are not copied: nothing trains them.
    """

    def __init__(self, trainer: Any) -> None:
        """Remember what is now; nothing is changed, and no memory of the device is used.

        Raises:
            MemoryError: The host has no room for a copy of the trained weights.
        """
        self._undo: list[Callable[[], Any]] = []
        self._seen: set[int] = set()
        with off_card():
            self._model(trainer.model)
            for owner in _owners(trainer):
                self._object(owner)
            for dataset in (trainer.train_dataset, trainer.eval_dataset):
                self._generators(getattr(dataset, "__dict__", {}))
            self._paged()
            # The last to be put back: what is done before may draw.
            self._undo.insert(0, partial(rng.restore, rng.snapshot()))

    def restore(self) -> None:
        """Put everything back; memory that the training gave away is asked for again."""
        for action in reversed(self._undo):
            again(release_at_most(_TRIES), action)

    def _model(self, model: nn.Module) -> None:
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                self._once(parameter, partial(_parameter, parameter))
            for buffer in module.buffers(recurse=False):
                if buffer.device.type != "meta":
                    self._once(buffer, partial(_buffer, buffer))
            self._object(module)

    def _once(self, thing: object, remember: Callable[[], Callable[[], Any]]) -> None:
        if id(thing) not in self._seen:
            self._seen.add(id(thing))
            self._undo.append(remember())

    def _object(self, thing: Any) -> None:
        """Remember an object's attributes, and what the containers among them hold."""
        self._container(vars(thing))

    def _container(self, container: Any) -> None:
        if id(container) in self._seen or len(container) > _LARGEST:
            return
        self._once(container, partial(_content, container))
        for value in list(container.values() if isinstance(container, dict) else container):
            if isinstance(value, _CONTAINERS):
                self._container(value)
            elif _is_config(value):
                self._object(value)
        if isinstance(container, dict):
            self._generators(container)

    def _generators(self, values: dict[str, Any]) -> None:
        for value in values.values():
            if isinstance(value, _GENERATORS):
                self._once(value, partial(_generator, value))

    def _paged(self) -> None:
        if find_spec("bitsandbytes") is None:
            return
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        self._object(GlobalOptimManager.get_instance())
        self._undo.append(partial(paging.own_since, paging.paged_so_far()))


def _owners(trainer: Any) -> Iterator[Any]:
    """What the trainer shares with its trainings, besides the model and its own attributes."""
    processing = getattr(trainer, "processing_class", None)
    accelerator = trainer.accelerator
    for owner in (
        trainer.data_collator,
        getattr(trainer.data_collator, "tokenizer", None),
        processing,
        getattr(processing, "tokenizer", None),
        inner_optimizer(trainer),
        trainer.lr_scheduler,
        accelerator.gradient_state,
        accelerator.state,
    ):
        if hasattr(owner, "__dict__"):
            yield owner


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "__dict__") and not callable(value)


def _content(container: Any) -> Callable[[], None]:
    content = container.copy()

    def put_back() -> None:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)

    return put_back


def _parameter(parameter: nn.Parameter) -> Callable[[], None]:
    trained, gradient, place = parameter.requires_grad, parameter.grad, parameter.device
    host = parameter.detach().to("cpu", copy=True) if trained else None

    def put_back() -> None:
        parameter.grad = None
        if host is not None:
            if (parameter.shape, parameter.dtype) != (host.shape, host.dtype):
                parameter.data = torch.empty_like(host, device=place)
            parameter.data.copy_(host)
        parameter.requires_grad_(trained)
        parameter.grad = gradient

    return put_back


def _buffer(buffer: Tensor) -> Callable[[], None]:
    host = buffer.detach().to("cpu", copy=True)

    def put_back() -> None:
        buffer.data.copy_(host)

    return put_back


def _generator(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
