"""Saving and loading under the guard: nothing lost to an out-of-memory, no checkpoint ever torn."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

import oomguard
from oomguard.saving import STAGING
from oomguard.testing import VirtualCard
from tests import tiny
from tests.twin import Run, differences, run, sft

if TYPE_CHECKING:
    from collections.abc import Iterable

SAVED: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}
# How long a run took, and where it wrote to.
TIMES = ("_runtime", "_per_second")


def build(folder: Path, **changes: Any) -> Any:
    """Two optimizer steps, each evaluated and saved; the better one is loaded at the end."""
    arguments = {"eval_dataset": tiny.text_dataset(4)}
    return sft(folder, **{"trainer_arguments": arguments, **SAVED, **changes})


def gathering(folder: Path, **changes: Any) -> Any:
    """The same, whose weights and optimizer state are copied when they are asked for."""
    trainer = build(folder, lora=None, **changes)
    trainer.model.register_state_dict_post_hook(_copy_weights)
    create = trainer.create_optimizer

    class Copying(type(trainer)):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> Any:
            made = create() if model is None else create(model)
            made.register_state_dict_post_hook(_copy_state)
            return made

    trainer.__class__ = Copying
    return trainer


def _copy_weights(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in list(state):
        state[name] = state[name].clone()


def _copy_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    copies = {
        index: {k: v.clone() if torch.is_tensor(v) else v for k, v in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": copies}


def content(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, file by file, without times and places."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = safetensors.torch.load_file(path)
        elif path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            best = state["best_model_checkpoint"]
            state["best_model_checkpoint"] = best and Path(best).name
            state["stateful_callbacks"].pop("OomguardState", None)  # tells what was recovered from
            for line in state["log_history"]:
                for key in [key for key in line if key.endswith(TIMES)]:
                    del line[key]
            found[name] = state
        elif path.suffix in {".pt", ".pth"}:
            found[name] = torch.load(path, weights_only=False)
        elif path.is_file():
            found[name] = path.stat().st_size > 0
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    try:
        return bool(one == other)
    except ValueError:  # numpy's random state
        return bool((one == other).all())


def assert_same_checkpoints(one: Path, other: Path, *leave: str) -> None:
    names = sorted(path.name for path in one.glob("checkpoint-*"))
    assert names == sorted(path.name for path in other.glob("checkpoint-*"))
    assert names
    for name in names:
        mine, theirs = content(one / name), content(other / name)
        assert mine.keys() == theirs.keys()
        different = [key for key in mine if not same(mine[key], theirs[key])]
        # The arguments name the folder that the trainer writes to.
        assert set(different) <= {"training_args.bin", *leave}, different
    assert not (one / STAGING).exists()


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


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
from tests.test_saving import build
trainer = build(Path(sys.argv[1]), max_steps=400, save_total_limit=2, eval_strategy="no",
                load_best_model_at_end=False, num_train_epochs=400)
print("ready", flush=True)
oomguard.fit(trainer)
"""


@pytest.mark.parametrize("seed", range(4))
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
