"""The oracle can see: other remedies, and the guard with a part taken out, fail the twin runs."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Trainer

from oomguard import rng
from tests.test_twin_losses import llama, plain
from tests.test_twin_plans import dropping
from tests.twin import CHECKPOINT, CLOSE, EXACT, Faults, assert_same, beyond, differences, run, twin

if TYPE_CHECKING:
    from pathlib import Path

IN_THE_SECOND_STEP: Faults = {("backward", 4): 12}
TEXT = partial(plain, make=llama)


def test_auto_find_batch_size_trains_something_else() -> None:
    searching = partial(TEXT, auto_find_batch_size=True)
    assert_same(run(searching), twin(TEXT), EXACT)

    recovered = run(searching, faults=IN_THE_SECOND_STEP)
    found = beyond(differences(recovered, twin(TEXT)), CLOSE)
    assert {"weights", "order", "events", "loss"} <= found.keys()
    assert {shape[0] for shape in (p.shape for p in recovered.passes)} == {4, 3}


class RetriesItsStep(Trainer):
    """What many training scripts do: catch the error and run the batch again."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            return super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError:
            logging.getLogger(__name__).info("once more")
        return super().training_step(*args, **kwargs)


def test_a_batch_run_again_on_top_of_half_its_gradients_trains_something_else() -> None:
    recovered = run(TEXT, faults=IN_THE_SECOND_STEP, front=(RetriesItsStep,))
    assert recovered.order == twin(TEXT).order
    assert beyond(differences(recovered, twin(TEXT)), CLOSE)["weights"] > 1e-5
    in_forward = run(TEXT, faults={("forward", 4): 40}, front=(RetriesItsStep,))
    assert_same(in_forward, twin(TEXT), EXACT)  # nothing had been added up yet


class RetriedAdamW(torch.optim.AdamW):
    """What a patched optimizer does: catch the error and make the step again."""

    def step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except torch.OutOfMemoryError:
            logging.getLogger(__name__).info("once more")
        return super().step(closure)


def with_optimizer(folder: Path, cls: type[torch.optim.AdamW], *, foreach: bool) -> Trainer:
    model = llama()
    optimizer = cls(model.parameters(), lr=1e-4, foreach=foreach)
    return plain(folder, make=lambda: model, arguments={"optimizers": (optimizer, None)})


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "one by one"])
def test_only_a_guarded_optimizer_step_happens_once(foreach: bool) -> None:
    own = partial(with_optimizer, cls=torch.optim.AdamW, foreach=foreach)
    naive = partial(with_optimizer, cls=RetriedAdamW, foreach=foreach)
    first, second = {("optimizer", 1): 12}, {("optimizer", 2): 12}
    assert_same(run(own, CHECKPOINT, first), twin(own), EXACT)
    assert_same(run(own, CHECKPOINT, second), twin(own), EXACT)

    assert_same(run(naive), twin(own), EXACT)
    found = differences(run(naive, faults=second), twin(own))
    assert beyond(found, CLOSE).keys() >= {"weights", "moments"}
    with pytest.raises(KeyError, match="exp_avg"):  # the state of one parameter is half made
        run(naive, faults=first)


def test_without_its_random_state_a_replay_trains_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rng, "restore", lambda state: None)
    recovered = run(dropping, CHECKPOINT, IN_THE_SECOND_STEP)
    found = beyond(differences(recovered, twin(dropping)), CLOSE)
    assert found["weights"] > 1e-5
    assert "rng" in found
