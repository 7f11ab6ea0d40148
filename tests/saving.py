"""Trainers that save, and what their checkpoints hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from oomguard.saving import STAGING
from tests import tiny
from tests.twin import sft

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
