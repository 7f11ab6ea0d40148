"""Short trainings with callbacks, and what their logs say of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tests import tiny

if TYPE_CHECKING:
    from pathlib import Path


class Heard(TrainerCallback):
    """Keeps what a callback in the place of an integration is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


class Fails(TrainerCallback):
    """Ends training at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            msg = "the user's own"
            raise ValueError(msg)


def make(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Any:
    arguments = {"callbacks": list(callbacks), "eval_dataset": tiny.text_dataset(4)}
    return tiny.sft_trainer(folder, trainer_arguments=arguments, **changes)


def vram(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("vram/")}
