"""How a holder is named. Objects are made inside the tests: frozen ones hide their referrers."""

from __future__ import annotations

import functools
import gc
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
import torch
from torch import nn

from oomguard.watch.chain import Chain, find_chains

if TYPE_CHECKING:
    from collections.abc import Callable

GLOBAL: dict[str, Any] = {}


class Owner:
    """Has attributes."""

    def __init__(self, kept: Any = None) -> None:
        self.kept = kept


class Slotted:
    __slots__ = ("kept", "unset")

    def __init__(self, kept: Any) -> None:
        self.kept = kept


def chain_of(make: Callable[[torch.Tensor], Any]) -> Chain | None:
    """The chain to a tensor in what `make` puts around it."""
    tensor = torch.zeros(4)
    holder = make(tensor)
    target = ref(tensor)
    del tensor
    (chain,) = find_chains([target])
    del holder
    return chain


def in_list(tensor: torch.Tensor) -> Owner:
    return Owner([torch.ones(1), tensor, torch.ones(1)])


def in_closure(tensor: torch.Tensor) -> Any:
    def hook() -> torch.Tensor:
        return tensor

    return hook


def as_default(tensor: torch.Tensor) -> Any:
    def hook(value: torch.Tensor = tensor) -> torch.Tensor:
        return value

    return hook


def on_function(tensor: torch.Tensor) -> Any:
    def hook() -> None:
        """Nothing."""

    hook.kept = tensor  # type: ignore[attr-defined]
    return hook


def on_class(tensor: torch.Tensor) -> Any:
    class Registry:
        kept = tensor

    return Registry


def in_generator(tensor: torch.Tensor) -> Any:
    def batches() -> Any:
        held = tensor.clone() if tensor is None else tensor
        yield 1
        yield held

    made = batches()
    next(made)
    return Owner(made)


def in_buffer(tensor: torch.Tensor) -> nn.Module:
    class Model(nn.Module):
        """Has a buffer."""

    model = Model()
    model.register_buffer("cache", tensor)
    return model


def in_library(tensor: torch.Tensor) -> Any:
    layer = nn.Linear(1, 1)
    layer.kept = tensor
    return Owner(layer)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Owner, "Owner.kept"),
        (Slotted, "Slotted.kept"),
        (in_list, "Owner.kept > list[1 of 3]"),
        (lambda t: Owner(deque([t])), "Owner.kept > deque[0 of 1]"),
        (lambda t: Owner({t}), "Owner.kept > set[one of 1]"),
        (
            lambda t: Owner({"a": 1, ("b", 2): [t]}),
            "Owner.kept > dict[('b', 2), one of 2] > list[0 of 1]",
        ),
        (lambda t: Owner({Owner(): t}), "Owner.kept > dict[a Owner, one of 1]"),
        (lambda t: Owner({t: 1}), "Owner.kept > dict[a key, one of 1]"),
        (lambda t: Owner({"x" * 99: t}), f"Owner.kept > dict['{'x' * 39}…, one of 1]"),
        (lambda t: Owner(functools.partial(print, t)), "Owner.kept > partial.args > tuple[0 of 1]"),
        (in_closure, "tensor in the closure of in_closure.hook()"),
        (as_default, "default argument of as_default.hook()"),
        (on_function, "on_function.hook().kept"),
        (on_class, "Registry.kept"),
        (in_generator, "Owner.kept > batches(), which is not finished"),
        (in_buffer, "Model.cache"),
        (in_library, "Owner.kept > Linear.kept"),
    ],
)
def test_a_holder_is_named_as_one_would_write_it(
    make: Callable[[torch.Tensor], Any], text: str
) -> None:
    chain = chain_of(make)
    assert chain is not None
    assert chain.text == text
    assert chain.root == text.split(" > ")[0].partition("[")[0]


def test_a_global_variable_is_named_with_its_module() -> None:
    try:
        chain = chain_of(lambda tensor: GLOBAL.update(kept=[tensor]))
    finally:
        GLOBAL.clear()
    assert chain is not None
    assert chain.text == "tests.test_chain.GLOBAL > dict['kept', one of 1] > list[0 of 1]"


def test_an_exception_is_named_with_the_variable_of_its_frame() -> None:
    def fails(tensor: torch.Tensor) -> Owner:
        activations = tensor
        try:
            int(f"{len(activations)} rows")
        except ValueError as error:
            return Owner([error])
        return Owner()

    chain = chain_of(fails)
    assert chain is not None
    assert chain.text.startswith("Owner.kept > list[0 of 1] > ValueError.__traceback__ > ")
    assert " in fails() at test_chain.py:" in chain.text


def test_the_shortest_of_several_ways_is_told() -> None:
    chain = chain_of(lambda tensor: [Owner([[tensor]]), Owner(tensor)])
    assert chain is not None
    assert chain.text == "Owner.kept"


def test_what_only_running_functions_hold_has_no_holder() -> None:
    tensor = torch.zeros(4)
    assert find_chains([ref(tensor)]) == [None]
    assert tensor.numel() == 4


def test_what_is_gone_has_no_holder() -> None:
    target = ref(torch.zeros(4))
    gc.collect()
    assert find_chains([target]) == [None]


def test_what_holds_an_object_of_a_named_type_is_asked_for() -> None:
    class Study:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.trials = [Owner(tensor)]

    tensor = torch.zeros(4)
    study, target = Study(tensor), ref(tensor)
    del tensor
    (chain,) = find_chains([target], beyond=(Owner,))
    assert chain is not None
    assert chain.text == "Study.trials > list[0 of 1] > Owner.kept"
    del study
