"""What watching costs a step: the time spent in callbacks, on a GPU where there is one.

    python -m benchmarks.overhead

A real `Trainer` trains a small model, logs every 50 steps and saves every 500: without a callback,
under `VRAMReporter`, under `LeakDetector` and under both, a thousand steps each, in turn and twice.
Every call of a callback's method is timed, and so is the hook that counts tokens. The figure of a
step is the mean time inside them; where other programs want the processor too, its own time tells
how much of that was theirs. By how much the median step is longer than without them stands
beside it, and is noisier. What comes once, by starting, saving and ending, is given apart. On a GPU
one more callback does nothing but have PyTorch tell its counters and start its peaks anew, which no
reading can do without; and it says whether a reading comes back while the device still works.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import oomguard
from oomguard.watch.batch import TokenCount
from oomguard.watch.readings import Meter, device_name

if TYPE_CHECKING:
    from collections.abc import Callable

Watchers = tuple[type[TrainerCallback], ...]


class Counters(TrainerCallback):
    """Has PyTorch tell its allocator's counters, and drops them."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        torch.cuda.memory_stats_as_nested_dict()
        torch.cuda.reset_peak_memory_stats()


WATCHERS: tuple[Watchers, ...] = (
    (),
    *([(Counters,)] if torch.cuda.is_available() else []),
    (oomguard.VRAMReporter,),
    (oomguard.LeakDetector,),
    (oomguard.VRAMReporter, oomguard.LeakDetector),
)
STEPS = 1000
ROUNDS = 2
WARM_UP_STEPS = 100
TOKENS = "counting tokens"
ONCE = {"on_train_begin", "on_save", "on_train_end"}  # the rest are of steps and log lines
CONSOLE = Console(width=110)


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


def make_trainer(folder: str, steps: int) -> Trainer:
    """A trainer of 4 x 16 tokens a step."""
    rows = torch.arange(256 * 16).remainder(64).reshape(-1, 16).tolist()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = Trainer(Model(), arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Call(NamedTuple):
    """Seconds of a call: all of them, and those that the processor worked on it."""

    wall_s: float
    processor_s: float


@dataclass
class Cost:
    """What was measured under some callbacks, over all rounds.

    Attributes:
        steps_s: Seconds from the beginning of each step to that of the next.
        calls: Every call, by the callback and its method.
    """

    steps_s: list[float] = field(default_factory=list)
    calls: dict[tuple[str, str], list[Call]] = field(default_factory=lambda: defaultdict(list))

    def of_step(self) -> Call:
        """What a step takes inside the callbacks."""
        return self._total(STEPS * ROUNDS, once=False)

    def of_training(self) -> Call:
        """What comes once in a training, or with a checkpoint."""
        return self._total(ROUNDS, once=True)

    def _total(self, parts: int, *, once: bool) -> Call:
        found = [calls for (_, name), calls in self.calls.items() if (name in ONCE) is once]
        each = [call for calls in found for call in calls]
        return Call(sum(c.wall_s for c in each) / parts, sum(c.processor_s for c in each) / parts)


class Clock(TrainerCallback):
    """Notes when each step begins."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self.times_s.append(time.perf_counter())


def noting(calls: list[Call], method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with every call added to a list."""

    @wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        processor, began = time.thread_time(), time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            wall_s = time.perf_counter() - began
            calls.append(Call(wall_s, time.thread_time() - processor))

    return timed


def timed(watcher: type[TrainerCallback], cost: Cost) -> TrainerCallback:
    """One of these callbacks that notes the seconds of every call."""
    methods = {
        name: noting(cost.calls[watcher.__name__, name], method)
        for name, method in inspect.getmembers(watcher, inspect.isfunction)
        if name.startswith("on_") and method is not getattr(TrainerCallback, name)
    }
    subclass: Any = type(watcher.__name__, (watcher,), methods)
    return cast("TrainerCallback", subclass())


def train(watchers: Watchers, steps: int, cost: Cost) -> None:
    """Train once under these callbacks."""
    clock, count = Clock(), TokenCount.__call__
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, steps)
        trainer.add_callback(clock)
        for watcher in watchers:
            trainer.add_callback(timed(watcher, cost))
        TokenCount.__call__ = noting(cost.calls[TOKENS, ""], count)  # type: ignore[method-assign]
        try:
            trainer.train()
        finally:
            TokenCount.__call__ = count  # type: ignore[method-assign]
    times = clock.times_s
    cost.steps_s += [late - early for early, late in pairwise(times)]


def measure() -> dict[Watchers, Cost]:
    """Train under each of the callbacks in turn."""
    train(WATCHERS[-1], WARM_UP_STEPS, Cost())
    costs = {watchers: Cost() for watchers in WATCHERS}
    for _ in range(ROUNDS):
        for watchers, cost in costs.items():
            train(watchers, STEPS, cost)
    return costs


def named(watchers: Watchers) -> str:
    """The callbacks in words."""
    return " and ".join(watcher.__name__ for watcher in watchers) or "none"


def methods(watchers: Watchers, cost: Cost) -> Table:
    """What every method took."""
    table = Table("", "", "calls", "median (µs)", "mean (µs)", "longest (µs)")
    table.title = f"Inside {named(watchers)}"
    for (owner, name), calls in cost.calls.items():
        if spent := [call.wall_s for call in calls]:
            figures = (median(spent), fmean(spent), max(spent))
            table.add_row(owner, name, str(len(spent)), *(f"{1e6 * s:,.1f}" for s in figures))
    return table


def summary(costs: dict[Watchers, Cost]) -> Table:
    """What each of them costs."""
    table = Table(
        "callbacks",
        "inside, a step (µs)",
        "of it processor (µs)",
        "median step (µs)",
        "longer than without (µs)",
        "once a training (ms)",
    )
    table.title = f"On {device_name()}, {STEPS * ROUNDS:,} steps each"
    plain_s = median(costs[()].steps_s)
    for watchers, cost in costs.items():
        step_s = median(cost.steps_s)
        figures = (*cost.of_step(), step_s, step_s - plain_s)
        once = f"{1e3 * cost.of_training().wall_s:,.1f}"
        table.add_row(named(watchers), *(f"{1e6 * s:,.1f}" for s in figures), once)
    return table


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
    """Print a table of calls for each, and one of all."""
    costs = measure()
    for watchers in WATCHERS[1:]:
        CONSOLE.print(methods(watchers, costs[watchers]))
    CONSOLE.print(summary(costs))
    if (found := waits()) is not None:
        CONSOLE.print(f"A reading waits for the device: {'yes' if found else 'no'}")


if __name__ == "__main__":
    main()
