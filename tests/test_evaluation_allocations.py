"""One allocation of an evaluation fails, whichever it is: its metrics are those of a whole one."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import transformers as tf

import oomguard
from oomguard.testing import VirtualCard
from tests.evaluation import (
    KINDS,
    assert_close,
    causal_lm,
    changes,
    logits_are_asked_for,
    numbers,
    summarizer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


pytestmark = logits_are_asked_for


def faults_that_show(
    build: Callable[[], Any], faults: Iterable[int], expected: dict[str, float]
) -> dict[int, str]:
    found = {}
    for fault in faults:
        trainer = build()
        try:
            tf.set_seed(1)
            with VirtualCard(fail_at=fault), oomguard.Guard(trainer) as guard:
                metrics = numbers(trainer.evaluate())
            assert_close(metrics, expected)
            assert len(changes(guard.report)) == 1
        except Exception as error:  # noqa: BLE001 - which allocation it was is the finding
            found[fault] = f"{type(error).__name__}: {error}"
    return found


EVERY: dict[str, Callable[[Path], Any]] = {
    "causal": causal_lm,
    "SFT with logits": KINDS["SFT with logits"],
    "generated": summarizer,
}


def allocations(build: Callable[[], Any], expected: dict[str, float]) -> int:
    trainer = build()
    tf.set_seed(1)
    with oomguard.Guard(trainer) as guard, VirtualCard(fail_at=10**9) as card:
        assert numbers(trainer.evaluate()) == expected
    assert not guard.report.recoveries
    return card.allocations


@pytest.mark.parametrize("kind", EVERY)
def test_any_allocation_of_an_evaluation_may_fail(kind: str, tmp_path: Path) -> None:
    build = partial(EVERY[kind], tmp_path)
    tf.set_seed(1)
    expected = numbers(build().evaluate())
    count = allocations(build, expected)
    sample = range(1, count + 1, max(1, count // 6))
    assert not faults_that_show(build, sample, expected)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("kind", EVERY)
def test_every_allocation_of_an_evaluation_may_fail(
    kind: str, part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = partial(EVERY[kind], tmp_path)
    tf.set_seed(1)
    expected = numbers(build().evaluate())
    count = allocations(build, expected)
    every = range(1 + part, count + 1, 4)
    found = faults_that_show(build, every, expected)
    with capsys.disabled():
        print(f"\n{kind}: {len(every)} of {count} allocations failed")
    assert not found, Counter(found.values())
