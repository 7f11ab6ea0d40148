"""Real causes of memory that grows, each in a real training: the detector names what holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainerCallback

from tests.leaks.runs import (
    STEPS,
    InOrder,
    MakesCycles,
    Tiny,
    evaluated,
    trainer_of,
    watched,
    without_collector,
)

if TYPE_CHECKING:
    from pathlib import Path

    from oomguard.watch.findings import Finding


def the_finding(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


def entropy(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A figure to watch, computed from the logits with gradients on."""
    probabilities = outputs["logits"].softmax(-1)
    return -(probabilities * probabilities.log()).sum(-1).mean()


def test_a_loss_kept_undetached_is_named_with_its_graph(tmp_path: Path) -> None:
    class Keeps(InOrder):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            self.__dict__.setdefault("entropies", []).append(entropy(outputs))

    finding = the_finding(watched(lambda: trainer_of(tmp_path, trainer_class=Keeps)))
    assert finding.kind == "leak"
    assert str(finding.holder).startswith("Keeps.entropies > list[")
    assert "the autograd graph of float32 []" in finding.message
    assert ".detach()" in str(finding.advice)


def test_outputs_that_a_callback_appends_are_named_with_how_fast_and_until_when(
    tmp_path: Path,
) -> None:
    class Collects(TrainerCallback):
        def __init__(self) -> None:
            self.outputs: list[torch.Tensor] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.outputs.append(kwargs["model"].last)

    class Shows(Tiny):
        def keep(self, hidden: torch.Tensor) -> torch.Tensor:
            self.last = hidden.detach()
            return hidden

    finding = the_finding(
        watched(lambda: trainer_of(tmp_path, model=Shows(), callbacks=[Collects()]))
    )
    assert str(finding.holder).startswith("Collects.outputs > list[")
    assert finding.bytes_per_step == pytest.approx(256 * 1024, rel=0.05)
    assert finding.phase == "train"
    assert finding.since_step is not None
    assert finding.since_step < 64
    assert finding.full_at_step is not None
    assert STEPS < finding.full_at_step[0] <= finding.full_at_step[1] < 2 * STEPS
    assert "256.00 KiB a step" in finding.message


@pytest.mark.slow
def test_a_running_sum_of_losses_is_named_with_its_graph(tmp_path: Path) -> None:
    class Sums(InOrder):
        total = torch.zeros(())

        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            self.total = self.total + entropy(outputs)

    finding = the_finding(watched(lambda: trainer_of(tmp_path, trainer_class=Sums)))
    assert finding.holder == "Sums.total"
    assert ".detach()" in str(finding.advice)


@pytest.mark.slow
def test_logits_kept_by_every_evaluation_are_put_down_to_the_evaluation(tmp_path: Path) -> None:
    class Metrics:
        def __init__(self) -> None:
            self.logits: list[torch.Tensor] = []

        def __call__(self, outputs: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
            self.logits.append(outputs[0])
            return outputs[0].argmax(-1)

    finding = the_finding(watched(lambda: evaluated(tmp_path, Metrics())))
    assert finding.phase == "eval"
    assert str(finding.holder).startswith("Metrics.logits > list[")


@pytest.mark.slow
def test_exceptions_kept_in_a_list_are_named_with_the_variable_of_the_frame(tmp_path: Path) -> None:
    class Tries(InOrder):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            errors = self.__dict__.setdefault("errors", [])
            try:
                self.check(outputs.pop("hidden").detach())
            except ValueError as error:
                errors.append(error)

        def check(self, activations: torch.Tensor) -> None:
            raise ValueError(len(activations))

    finding = the_finding(watched(lambda: trainer_of(tmp_path, trainer_class=Tries)))
    assert str(finding.holder).startswith("Tries.errors > list[")
    assert "ValueError.__traceback__ > activations in check() at test_causes.py:" in str(
        finding.holder
    )
    assert "str(error)" in str(finding.advice)


@pytest.mark.slow
def test_a_penalty_made_with_create_graph_is_named_with_its_graph(tmp_path: Path) -> None:
    class Penalises(InOrder):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            assert self.model is not None
            weights = list(self.model.parameters())
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
            self.__dict__.setdefault("penalties", []).append(penalty)

    finding = the_finding(
        watched(lambda: trainer_of(tmp_path, trainer_class=Penalises), capacity_bytes=256 * 2**20)
    )
    assert str(finding.holder).startswith("Penalises.penalties > list[")
    assert ".detach()" in str(finding.advice)


@pytest.mark.slow
def test_hidden_states_kept_by_the_trainer_are_named(tmp_path: Path) -> None:
    class Keeps(InOrder):
        def keep(self, loss: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
            self.__dict__.setdefault("by_step", {})[self.state.global_step] = outputs["hidden"]

    finding = the_finding(watched(lambda: trainer_of(tmp_path, trainer_class=Keeps)))
    assert str(finding.holder).startswith("Keeps.by_step > dict[")


@pytest.mark.slow
def test_a_cache_of_a_module_without_a_bound_is_named(tmp_path: Path) -> None:
    class Caches(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[tuple[int, str], torch.Tensor] = {}

        def keep(self, hidden: torch.Tensor) -> torch.Tensor:
            self.cache[len(self.cache), "mask"] = torch.ones_like(hidden)
            return hidden

    finding = the_finding(watched(lambda: trainer_of(tmp_path, model=Caches())))
    assert str(finding.holder).startswith("Caches.cache > dict[(")
    assert "bound what the module keeps" in str(finding.advice)


@pytest.mark.slow
def test_the_optimizers_of_old_trainers_are_named_when_the_next_one_begins(tmp_path: Path) -> None:
    class Study:
        def __init__(self) -> None:
            self.trainers: list[InOrder] = []

        def next_trainer(self) -> InOrder:
            model = Tiny()
            model.layer = torch.nn.Linear(128, 128)
            model.more = torch.nn.Linear(1024, 512)
            self.trainers.append(trainer_of(tmp_path, model=model, max_steps=2))
            return self.trainers[-1]

    finding = the_finding(watched(Study().next_trainer, trainings=3))
    assert (finding.kind, finding.phase, finding.step) == ("leak", "training", 0)
    assert "Study.trainers > list[" in str(finding.holder)


@pytest.mark.slow
def test_a_hook_that_keeps_activations_is_named_by_its_variable(tmp_path: Path) -> None:
    def make() -> InOrder:
        model, activations = Tiny(), list[torch.Tensor]()

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            activations.append(output.detach())

        model.layer.register_forward_hook(hook)
        return trainer_of(tmp_path, model=model)

    finding = the_finding(watched(make))
    assert str(finding.holder).startswith("activations in the closure of ")
    assert "handle.remove()" in str(finding.advice)


@pytest.mark.slow
def test_a_cache_replaced_by_a_longer_one_is_named_although_no_tensor_stays(tmp_path: Path) -> None:
    class Remembers(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.keys = torch.zeros(2, 0, 128)

        def keep(self, hidden: torch.Tensor) -> torch.Tensor:
            self.keys = torch.cat([self.keys, hidden[:2].detach()], dim=1)
            return hidden

    finding = the_finding(
        watched(
            lambda: trainer_of(tmp_path, model=Remembers(), max_steps=STEPS + 100),
            capacity_bytes=40 * 2**20,
        )
    )
    assert finding.holder == "Remembers.keys"
    assert "replaced by a larger one" in finding.message


def test_what_only_waits_for_the_garbage_collector_is_told_apart(tmp_path: Path) -> None:
    with without_collector():
        finding = the_finding(watched(lambda: trainer_of(tmp_path, trainer_class=MakesCycles)))
    assert finding.kind == "cycles"
    assert str(finding.holder).startswith("Node.activation")
    assert "gc.collect()" in str(finding.advice)
