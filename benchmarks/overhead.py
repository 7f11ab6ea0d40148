"""What watching costs a step: the time spent in callbacks, on a GPU where there is one.

    python -m benchmarks.overhead

A real `Trainer` trains a small model for 2,000 steps, logs every 50 and saves every 500. Every call
of a callback's method is timed, writing its file included, and the hook that counts tokens is
timed alone. On a GPU it also says whether a reading comes back while the device still works, that
is, without waiting for it.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections import defaultdict
from functools import wraps
from statistics import median
from timeit import timeit
from typing import TYPE_CHECKING, Any, cast

import rich
import torch
from datasets import Dataset
from rich.table import Table
from transformers import Trainer, TrainerCallback, TrainingArguments

import oomguard
from oomguard.watch.batch import TokenCount
from oomguard.watch.readings import Meter, device_name

if TYPE_CHECKING:
    from collections.abc import Callable

WATCHERS: tuple[type[TrainerCallback], ...] = (oomguard.VRAMReporter, oomguard.LeakDetector)
STEPS = 2000


class Model(torch.nn.Module):
    """Predicts the tokens it is given; a step of it is short."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 16)
        self.head = torch.nn.Linear(16, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss, where a Trainer looks for it."""
        logits = self.head(self.embed(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def make_trainer(folder: str) -> Trainer:
    """A trainer of 4 x 16 tokens a step."""
    rows = torch.arange(256 * 16).remainder(64).reshape(-1, 16).tolist()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return Trainer(Model(), arguments, train_dataset=dataset)


def timed(watcher: type[TrainerCallback], spent_s: dict[str, list[float]]) -> TrainerCallback:
    """One of these callbacks that adds the seconds of every call to `spent_s`, by its method."""

    def note(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def noting(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                spent_s[name].append(time.perf_counter() - began)

        return noting

    methods = {
        name: note(name, method)
        for name, method in inspect.getmembers(watcher, inspect.isfunction)
        if name.startswith("on_") and method is not getattr(TrainerCallback, name)
    }
    subclass: Any = type(watcher.__name__, (watcher,), methods)
    return cast("TrainerCallback", subclass())


def measure(watcher: type[TrainerCallback]) -> Table:
    """Train once under this callback."""
    spent_s: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder)
        trainer.add_callback(timed(watcher, spent_s))
        began = time.perf_counter()
        trainer.train()
        step_s = (time.perf_counter() - began) / STEPS
    table = Table("", "calls", "median (µs)", "longest (µs)", "a step (µs)")
    table.title = f"{watcher.__name__} on {device_name()}, steps of {step_s * 1e6:,.0f} µs"
    for name, calls in spent_s.items():
        figures = (median(calls), max(calls), sum(calls) / STEPS)
        table.add_row(name, str(len(calls)), *map(micros, figures))
    table.add_row("together", "", "", "", micros(sum(map(sum, spent_s.values())) / STEPS))
    return table


def micros(seconds: float) -> str:
    """Seconds as text in microseconds."""
    return f"{seconds * 1e6:,.1f}"


def hook_micros() -> float:
    """Microseconds of counting the tokens of one forward pass."""
    model, count = Model(), TokenCount()
    batch = {"input_ids": torch.zeros(4, 16, dtype=torch.long)}
    return timeit(lambda: count(model, (), batch), number=10_000) / 10_000 * 1e6


def waits() -> bool | None:
    """Whether a reading comes back only after the device has done its work; `None` without one."""
    if not torch.cuda.is_available():
        return None
    square = torch.randn(8192, 8192, device="cuda")
    meter, done = Meter(peaks="step"), torch.cuda.Event()
    meter.take(0)
    torch.cuda.synchronize()
    for _ in range(50):
        square @ square
    done.record()
    meter.take(1)
    return bool(done.query())


def main() -> None:
    """Print a table for each watcher."""
    for watcher in WATCHERS:
        rich.print(measure(watcher))
    rich.print(f"Counting the tokens of one pass: {hook_micros():.1f} µs")
    if (found := waits()) is not None:
        rich.print(f"A reading waits for the device: {'yes' if found else 'no'}")


if __name__ == "__main__":
    main()
