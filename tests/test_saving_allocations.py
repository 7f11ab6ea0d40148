"""One allocation fails while a checkpoint is saved or loaded, whichever it is: nothing is lost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from oomguard.testing import VirtualCard
from tests.saving import assert_same_checkpoints, gathering
from tests.twin import Run, differences, run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class PlacedCard(VirtualCard):
    """Fails as told in one phase, and counts its allocations."""

    def __init__(self, make: Any, phase: str, *fails: int) -> None:
        super().__init__(fail_at=10**9)
        self.phase, self.fails, self.seen = phase, fails, 0
        self._make = make

    def build(self, folder: Path) -> Any:
        self.trainer = self._make(folder)
        return self.trainer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.allocations
        out = super().__torch_dispatch__(func, types, args, kwargs)
        hooks = getattr(self.trainer, "_oomguard", None)
        for _ in range(before, self.allocations):
            self.seen += hooks is not None and hooks.outside.phase == self.phase
            if hooks is not None and hooks.outside.phase == self.phase and self.seen in self.fails:
                del out
                msg = "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity"
                raise torch.OutOfMemoryError(msg)
        return out


def faulted(
    make: Any, folder: Path, phase: str, *fails: int, **train_arguments: Any
) -> tuple[Run, PlacedCard]:
    card = PlacedCard(make, phase, *fails)
    return run(card.build, "default", folder=folder, card=card, **train_arguments), card


def faults_that_show(
    make: Any, phase: str, faults: Iterable[tuple[int, ...]], plain: Run, folder: Path, **kw: Any
) -> dict[tuple[int, ...], str]:
    found = {}
    for fault in faults:
        mine = folder / f"faulted-{fault[0]}-{len(fault)}"
        try:
            met, _ = faulted(make, mine, phase, *fault, **kw)
            wrong = differences(met, plain)
            rows = [recovery.event.phase for recovery in met.recoveries]
            assert not wrong, wrong
            assert rows == [phase] * len(fault), rows
            assert met.report is not None
            assert met.report.plan == met.report.initial_plan
            assert_same_checkpoints(mine, folder / "plain")
        except Exception as error:  # noqa: BLE001 - which allocation it was is the finding
            found[fault] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("phase", ["save", "load"])
def test_any_allocation_while_saving_or_loading_may_fail(phase: str, tmp_path: Path) -> None:
    plain = run(gathering, folder=tmp_path / "plain")
    clean, card = faulted(gathering, tmp_path / "clean", phase)
    assert not clean.recoveries
    assert not differences(clean, plain)
    assert card.seen > 20
    sample = [(k,) for k in range(1, card.seen + 1, card.seen // 6)]
    assert not faults_that_show(gathering, phase, sample, plain, tmp_path)


def test_what_fails_twice_while_saving_is_written_through_the_cpu(tmp_path: Path) -> None:
    plain = run(gathering, folder=tmp_path / "plain")
    _, card = faulted(gathering, tmp_path / "clean", "save")
    sample = [(k, k + 1) for k in range(1, card.seen, card.seen // 5)]
    assert not faults_that_show(gathering, "save", sample, plain, tmp_path)
    met, _ = faulted(gathering, tmp_path / "cpu", "save", 3, 4)
    assert [recovery.change for recovery in met.recoveries] == [None, "results moved to the CPU"]


def resumed(folder: Path) -> Any:
    return gathering(folder, max_steps=2, load_best_model_at_end=False)


def first_step(folder: Path) -> str:
    trainer = gathering(folder, max_steps=2, load_best_model_at_end=False)
    trainer.train()
    return str(folder / "checkpoint-1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return first_step(tmp_path_factory.mktemp("first"))


def test_any_allocation_while_resuming_may_fail(checkpoint: str, tmp_path: Path) -> None:
    resume: dict[str, Any] = {"resume_from_checkpoint": checkpoint}
    plain = run(resumed, folder=tmp_path / "plain", **resume)
    clean, card = faulted(resumed, tmp_path / "clean", "load", **resume)
    assert not differences(clean, plain)
    sample = [(k,) for k in range(1, card.seen + 1, max(1, card.seen // 6))]
    assert not faults_that_show(resumed, "load", sample, plain, tmp_path, **resume)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("phase", ["save", "load", "resume"])
def test_every_allocation_while_saving_or_loading_may_fail(
    phase: str, part: int, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume: dict[str, Any] = {"resume_from_checkpoint": checkpoint} if phase == "resume" else {}
    make, inside = (resumed, "load") if resume else (gathering, phase)
    plain = run(make, folder=tmp_path / "plain", **resume)
    _, card = faulted(make, tmp_path / "clean", inside, **resume)
    every = [(k,) for k in range(1 + part, card.seen + 1, 4)]
    found = faults_that_show(make, inside, every, plain, tmp_path, **resume)
    with capsys.disabled():
        print(f"\n{phase}: {len(every)} of {card.seen} allocations failed")
    assert not found, Counter(found.values())
