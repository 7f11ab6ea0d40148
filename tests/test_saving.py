"""Checkpoints written under the guard: those of a plain run, and never a torn one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

import oomguard
from oomguard.saving import STAGING
from oomguard.testing import VirtualCard
from tests.saving import assert_same_checkpoints, build, content, gathering, steps
from tests.twin import differences, run


def test_checkpoints_are_those_of_an_unguarded_run(tmp_path: Path) -> None:
    plain = run(build, folder=tmp_path / "plain")
    guarded = run(build, "default", folder=tmp_path / "guarded")
    assert not differences(guarded, plain)
    assert_same_checkpoints(tmp_path / "guarded", tmp_path / "plain")


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("best", [True, False])
def test_old_checkpoints_are_deleted_as_before(limit: int, best: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 5, "save_total_limit": limit, "learning_rate": 0.05}
    changes |= {"load_best_model_at_end": best, "greater_is_better": best}
    make = partial(build, **changes)
    run(make, folder=tmp_path / "plain")
    run(make, "default", folder=tmp_path / "guarded")
    assert_same_checkpoints(tmp_path / "guarded", tmp_path / "plain")
    assert len(steps(tmp_path / "guarded")) <= max(limit, 2)


def test_adapters_are_loaded_by_way_of_the_cpu(tmp_path: Path) -> None:
    run(build, folder=tmp_path)
    trainer = build(tmp_path / "again")
    devices: list[Any] = []
    load = trainer.model.load_adapter

    def load_adapter(*args: Any, **kwargs: Any) -> Any:
        devices.append(kwargs.get("torch_device"))
        return load(*args, **kwargs)

    trainer.model.load_adapter = load_adapter
    oomguard.fit(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert devices == ["cpu"] * 2  # when resuming, and for the best one at the end


class Disk(SFTTrainer):
    """Runs out of disk while the second checkpoint is written."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 2:
            raise OSError(28, "No space left on device")
        super()._save_rng_state(output_dir)


def test_a_checkpoint_that_could_not_be_finished_is_absent(tmp_path: Path) -> None:
    trainer = build(tmp_path, trainer_class=Disk)
    with pytest.raises(OSError, match="No space left"):
        oomguard.fit(trainer)
    assert steps(tmp_path) == ["checkpoint-1"]
    assert not (tmp_path / STAGING).exists()
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-1" / "trainer_state.json"))
    assert state.global_step == 1


class More(SFTTrainer):
    """Writes files of its own beside the Trainer's: before, with and after them."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        folder.mkdir(parents=True)
        (folder / "before").write_text("b")
        super()._save_checkpoint(model, trial)
        (folder / "after").write_text("a")

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        Path(output_dir, "with").write_text("w")


class Alone(SFTTrainer):
    """Writes checkpoints all by itself."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        self.save_model(str(folder), _internal_call=True)
        (folder / "own").write_text("o")


@pytest.mark.parametrize("own", [More, Alone])
def test_a_trainer_may_write_files_of_its_own(own: type[SFTTrainer], tmp_path: Path) -> None:
    make = partial(build, trainer_class=own, load_best_model_at_end=False)
    run(make, folder=tmp_path / "plain")
    run(make, "default", folder=tmp_path / "guarded")
    assert_same_checkpoints(tmp_path / "guarded", tmp_path / "plain")


def test_a_checkpoint_is_in_its_place_before_it_is_pushed(tmp_path: Path) -> None:
    pushed = []

    class Pushing(SFTTrainer):
        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            pushed.append({path.name for path in Path(checkpoint_folder).iterdir()})

    trainer = build(tmp_path, trainer_class=Pushing)
    trainer.args.push_to_hub = True
    oomguard.fit(trainer)
    assert len(pushed) == 2
    assert all("trainer_state.json" in names for names in pushed)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    old = tmp_path / "checkpoint-2"
    old.mkdir()
    (old / "optimizer.pt").write_text("torn")
    (old / "notes.txt").write_text("kept, as upstream keeps it")
    (tmp_path / STAGING / "checkpoint-9").mkdir(parents=True)  # of a process that was killed
    oomguard.fit(build(tmp_path))
    assert torch.load(old / "optimizer.pt", weights_only=True)["state"]
    assert (old / "notes.txt").exists()
    assert not (tmp_path / STAGING).exists()


def test_saving_the_model_by_hand_is_guarded_too(tmp_path: Path) -> None:
    trainer = gathering(tmp_path)
    with VirtualCard(fail_at=(2, 3)), oomguard.Guard(trainer) as guard:
        trainer.save_model(str(tmp_path / "own"))
    saved = safetensors.torch.load_file(tmp_path / "own" / "model.safetensors")
    weights = dict(trainer.model.named_parameters())
    assert saved.keys() <= weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    assert [recovery.event.phase for recovery in guard.report.recoveries] == ["save"] * 2


KILLED = """
import sys
from pathlib import Path
import oomguard
from tests.saving import build
trainer = build(Path(sys.argv[1]), max_steps=400, save_total_limit=2, eval_strategy="no",
                load_best_model_at_end=False, num_train_epochs=400)
print("ready", flush=True)
oomguard.fit(trainer)
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))])
def test_a_kill_at_any_moment_leaves_no_torn_checkpoint(seed: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    where = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=where, stdout=subprocess.PIPE) as process:  # noqa: S603
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while len(steps(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(seed).random() / 2)  # noqa: S311 - any moment will do
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    found = steps(tmp_path)
    assert found
    contents = [content(tmp_path / name) for name in found]
    files = {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"}
    assert all(each.keys() >= {*files, "trainer_state.json"} for each in contents)
    assert len({tuple(each) for each in contents}) == 1
    last = get_last_checkpoint(str(tmp_path))
    trainer = build(tmp_path, max_steps=int(str(last).rpartition("-")[2]) + 1)
    report = oomguard.fit(trainer, resume_from_checkpoint=True)
    assert report.status == "finished"
    assert not (tmp_path / STAGING).exists()


def test_plain_trainers_checkpoints_are_staged_too() -> None:
    assert "save_to_json" in vars(TrainerState)
    names = Trainer._save_checkpoint.__code__.co_names
    parts = ["save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"]
    order = [name for name in names if name in {*parts, "save_to_json", "_push_from_checkpoint"}]
    assert order == [*parts, "save_to_json", "_push_from_checkpoint"], (
        "Trainer._save_checkpoint writes other parts or in another order: see saving.Staging"
    )


def test_no_checkpoint_is_deleted_under_its_own_name(tmp_path: Path) -> None:
    deleted: list[str] = []
    watching = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "shutil.rmtree":
            deleted.append(str(arguments[0]))

    sys.addaudithook(audit)  # for good: there is no way to take one back
    changes: dict[str, Any] = {"max_steps": 4, "save_total_limit": 1, "eval_strategy": "no"}
    oomguard.fit(build(tmp_path, load_best_model_at_end=False, **changes))
    watching = False
    assert steps(tmp_path) == ["checkpoint-4"]
    assert deleted
    assert {Path(path).name for path in deleted} == {STAGING}
