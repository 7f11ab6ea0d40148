"""Which checkpoint a training goes on from."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from oomguard.resumption import last_checkpoint, read_checkpoint, written
from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


def write(folder: Path, step: int, *, last: int = 10, files: tuple[str, ...] = FILES) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in files:
        (path / name).write_text(json.dumps({"global_step": step, "max_steps": last}))
    return path


def test_the_furthest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        write(tmp_path, step, last=20)
    write(tmp_path, 12, files=("optimizer.pt", "scheduler.pt"))
    found = last_checkpoint(tmp_path, {})
    assert found is not None
    assert (found.path.name, found.step, found.ended, found.exact) == (
        "checkpoint-10",
        10,
        False,
        True,
    )


@pytest.mark.parametrize("text", ["", '{"global_step": 4, "max', "[]", '{"max_steps": 9}', "null"])
def test_a_checkpoint_whose_state_is_cut_short_is_none(tmp_path: Path, text: str) -> None:
    (write(tmp_path, 4) / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path, {}) is None


def test_a_folder_that_holds_another_step_than_its_name_says_is_none(tmp_path: Path) -> None:
    assert read_checkpoint(write(tmp_path, 4).rename(tmp_path / "checkpoint-5")) is None
    assert read_checkpoint(write(tmp_path, 4).rename(tmp_path / "tmp-checkpoint-4")) is None


def test_without_the_optimizer_only_the_end_of_a_training_counts(tmp_path: Path) -> None:
    write(tmp_path, 4, files=("trainer_state.json",))
    assert last_checkpoint(tmp_path, {}) is None
    write(tmp_path, 10, files=("trainer_state.json",))
    found = last_checkpoint(tmp_path, {})
    assert found is not None
    assert found.ended


def test_checkpoints_of_a_run_before_count_once_they_are_written_anew(tmp_path: Path) -> None:
    state = write(tmp_path, 4) / "trainer_state.json"
    write(tmp_path, 8)
    stale = written(tmp_path)
    assert last_checkpoint(tmp_path, stale) is None
    os.utime(state, ns=(1, 1))
    found = last_checkpoint(tmp_path, stale)
    assert found is not None
    assert found.step == 4


def test_there_is_none_where_there_is_no_folder(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere", {}) is None


def test_the_trainer_writes_what_is_looked_for(tmp_path: Path) -> None:
    tiny.sft_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4).train()
    found = read_checkpoint(tmp_path / "checkpoint-2")
    assert found is not None
    assert (found.step, found.ended, found.exact) == (2, False, True)
    last = last_checkpoint(tmp_path, {})
    assert last is not None
    assert (last.step, last.ended) == (4, True)
