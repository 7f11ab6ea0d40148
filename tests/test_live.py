"""Memory and plan on the progress bar of real trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from transformers import ProgressCallback, TrainerCallback
from trl.trainer import utils

import oomguard
from oomguard.ladder import Ladder
from oomguard.plan import Plan
from oomguard.testing import VirtualCard
from oomguard.watch import live
from oomguard.watch.readings import Reading
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
PLAN = Plan(per_device_train_batch_size=8, micro_batch_size=2)


@pytest.mark.parametrize(
    ("reading", "total", "plan", "expected"),
    [
        (
            {"reserved_bytes": int(10.9 * GIB)},
            12 * GIB,
            PLAN,
            "vram 10.9/12.0 GiB, plan 4 passes x 2",
        ),
        ({"reserved_bytes": GIB, "allocated_bytes": 9}, 12 * GIB, None, "vram 1.0/12.0 GiB"),
        (
            {"allocated_bytes": 2**19, "peak_allocated_bytes": 3 * 2**20},
            2**23,
            None,
            "vram 3.0/8.0 MiB",
        ),
        ({"allocated_bytes": 3 * GIB}, None, None, "vram 3.0 GiB"),
        ({"host_rss_bytes": GIB}, None, PLAN, "plan 4 passes x 2"),
        ({"host_rss_bytes": GIB}, None, None, ""),
    ],
)
def test_the_bar_says_what_is_held_of_the_card_and_the_plan(
    reading: dict[str, Any], total: int | None, plan: Plan | None, expected: str
) -> None:
    assert live.text(Reading(step=1, time_s=1.0, **reading), total, plan) == expected


class Bar(TrainerCallback):
    """Notes what stands on the progress bar after each step."""

    def __init__(self, folder: Path, card: str, **changes: Any) -> None:
        self.said: list[str | None] = []
        self.plan: Plan | None = None
        trainer = tiny.sft_trainer(folder, **{"disable_tqdm": False, "max_steps": 3, **changes})
        self.trainer: Any = trainer
        self.card = VirtualCard(card)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                bar: Any = callback.training_bar
                self.said.append(bar.postfix)

    def run(self, *, guarded: bool) -> list[str | None]:
        self.trainer.add_callback(self)
        with self.card as card:
            card.track(self.trainer.model)
            if guarded:
                self.plan = oomguard.fit(self.trainer, ladder=Ladder(oomguard.SplitBatch())).plan
            else:
                self.trainer.train()
        return self.said


def test_the_reporter_alone_shows_memory(tmp_path: Path) -> None:
    bar = Bar(tmp_path, "64MiB")
    bar.trainer.add_callback(oomguard.VRAMReporter())
    said = bar.run(guarded=False)
    assert len(said) == 3
    assert all(text and text.startswith("vram ") and text.endswith("/64.0 MiB") for text in said)


def test_the_guard_shows_the_plan_in_force_too(tmp_path: Path) -> None:
    size = 40 if hasattr(utils, "add_fused_lm_head") else 4  # no tiles of a fused head
    bar = Bar(tmp_path, f"{size}MiB")
    said = bar.run(guarded=True)
    assert all(text and f"/{size}.0 MiB, plan " in text for text in said)
    assert bar.plan is not None
    assert bar.plan.passes_per_step > 2
    passes, rows = bar.plan.passes_per_step, bar.plan.rows_per_pass
    assert (said[-1] or "").endswith(f"plan {passes} passes x {rows}"), said


def test_without_a_bar_nothing_is_shown_and_nothing_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bar = Bar(tmp_path, "64MiB", disable_tqdm=True)
    bar.trainer.add_callback(oomguard.VRAMReporter())
    assert bar.run(guarded=False) == []
    assert not caplog.records


def test_outside_of_a_training_there_is_no_handler_and_no_bar() -> None:
    assert live.handler() is None
    assert live.bar(None) is None
