"""A callback that records a run's memory and leaves everything else as it is."""

from __future__ import annotations

import atexit
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

from transformers import TrainerCallback

from oomguard.watch import live
from oomguard.watch.account import account
from oomguard.watch.batch import TokenCount
from oomguard.watch.quiet import Quiet
from oomguard.watch.readings import (
    Meter,
    Peaks,
    Phase,
    Reading,
    allocated_bytes,
    card_total_bytes,
    device_name,
)
from oomguard.watch.series import FILE_NAME, Breakdown, Series, highest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from oomguard.plan import Plan

_WRITE_EVERY_S = 30.0
_SHOW_EVERY_S = 0.1  # a bar is not drawn more often


class Guarded(Protocol):
    """What a guard tells of the run; its report does."""

    @property
    def plan(self) -> Plan:
        """The plan in force now."""

    @property
    def recoveries(self) -> Sequence[Any]:
        """What was recovered from so far."""


class VRAMRecorder(TrainerCallback):
    """Records the run's memory in `oomguard_vram.parquet` and shows it on the progress bar.

    Every guarded run has one. Beside what it writes and shows, it leaves no trace: log lines are
    those of the run without it, and PyTorch's peak counters too, so that on a GPU the peak of a
    step is known only where it rose above all before it.

    Whatever fails in it is told once, as a warning, and does not reach training.

    Attributes:
        guarded: What the guard tells, while there is one.
    """

    def __init__(self) -> None:
        self.guarded: Guarded | None = None
        self._run: _Run | None = None
        name = type(self).__name__
        self._begins = Quiet(f"{name} does not record this run")
        self._resumes = Quiet(f"{name} begins a new {FILE_NAME}")
        self._reads = Quiet(f"{name} does not read memory")
        self._accounts = Quiet(f"{name} does not tell what the memory consists of")
        self._writes = Quiet(f"{name} does not write {FILE_NAME}")
        self._shows = Quiet(f"{name} shows nothing on the progress bar")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a series, or go on with that of the run that is resumed."""
        self.close()  # an earlier call may have failed
        if not state.is_world_process_zero:
            return
        with self._begins:
            series = Series(device_name(), card_total_bytes())
            path = Path(args.output_dir) / FILE_NAME
            with self._resumes:
                if state.global_step and path.exists():
                    series.go_on(Series.load(path), state.global_step)
            self._run = _Run(path, series, self._peaks_for(args))
            self._run.recoveries = 0 if self.guarded is None else len(self.guarded.recoveries)
            with self._reads:
                self._run.skip_peaks(state.global_step)
            if not args.torch_compile:
                self._run.hook = self._run.tokens.attach(kwargs["model"])
            self._run.callbacks = handler = live.handler()
            if handler is not None and self in handler.callbacks:
                # Those after it draw and log what it says. The handler goes through this list now,
                # and finds what comes after here in its place.
                handler.callbacks.remove(self)
                handler.callbacks.insert(0, self)
            atexit.register(self.close)  # a run that fails does not end

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Account for the memory while there are gradients, the rarer the longer the run."""
        if self._run is not None and self._run.is_accounted():
            with self._accounts:
                self._run.account(state.global_step + 1, kwargs["model"], kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read what one optimizer step took."""
        run = self._run
        if run is None:
            return
        with self._reads:
            tokens = run.tokens.take()
            if self.guarded is not None and run.recoveries != len(self.guarded.recoveries):
                run.recoveries, tokens = len(self.guarded.recoveries), None
            run.read(state.global_step, "train", tokens)
        if run.is_due(self.guarded):
            with self._shows:
                run.show(self.guarded)
            if run.is_old():
                with self._writes:
                    run.write()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read what an evaluation took."""
        self._after(state, "eval")

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Read what a prediction took."""
        self._after(state, "eval")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read what a checkpoint took, and have the file say all that was read before it."""
        self._after(state, "save")
        with self._writes:
            if self._run is not None:
                self._run.write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file."""
        self.close()

    def close(self) -> None:
        """Write what there is, and watch no longer; training that failed calls no callback."""
        run, self._run = self._run, None
        if run is None:
            return
        atexit.unregister(self.close)
        if run.hook is not None:
            run.hook.remove()
        with self._writes:
            run.write()

    def reading_of(self, step: int) -> Reading | None:
        """What was read at the end of this training step, if it is the last that was read."""
        latest = None if self._run is None else self._run.latest
        if latest is None or latest.step != step or latest.phase != "train":
            return None
        return latest

    def _after(self, state: Any, phase: Phase) -> None:
        if self._run is not None:
            with self._reads:
                self._run.read(state.global_step, phase)

    def _peaks_for(self, args: Any) -> Peaks:
        return "risen"


@final
class _Run:
    """One call of `train()` that is recorded."""

    def __init__(self, path: Path, series: Series, peaks: Peaks) -> None:
        self.path = path
        self.series = series
        self.tokens = TokenCount()
        self.hook: Any = None
        self.callbacks: Any = None
        self.recoveries = 0
        self.latest: Reading | None = None
        self._logged: Reading | None = None
        self._peaks: tuple[int | None, int | None] = (None, None)
        self._steps = 0
        self._meter = Meter(peaks=peaks, began_s=series.time_s)
        self._written_s = series.time_s
        self._due_s = 0.0
        self._plan: Plan | None = None

    def skip_peaks(self, step: int) -> None:
        """Leave out what was needed before training, such as by loading the model."""
        self._meter.take(step)

    def read(self, step: int, phase: Phase, batch_tokens: int | None = None) -> None:
        """Take a reading into the series."""
        self.latest = reading = self._meter.take(step, phase, batch_tokens)
        self.series.add(reading)
        if phase == "train":
            self._logged = reading
            allocated, reserved = self._peaks
            self._peaks = (
                highest(allocated, reading.peak_allocated_bytes),
                highest(reserved, reading.peak_reserved_bytes),
            )

    def take_since_logged(self) -> Reading | None:
        """The last step with the highest peaks since this was last asked; `None` without one."""
        reading, (allocated, reserved) = self._logged, self._peaks
        self._logged, self._peaks = None, (None, None)
        if reading is None:
            return None
        return reading._replace(peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)

    def is_accounted(self) -> bool:
        """Whether a breakdown is due: at the first, second, fourth, eighth, … call."""
        self._steps += 1
        return not self._steps & (self._steps - 1)

    def account(self, step: int, model: Any, optimizer: Any) -> None:
        """Take a breakdown into the series."""
        found, allocated = account(model, optimizer), allocated_bytes()
        other = None if allocated is None else allocated - found.total_bytes
        self.series.add_breakdown(
            Breakdown(
                step=step,
                weights_bytes=found.weights_bytes,
                gradients_bytes=found.gradients_bytes,
                optimizer_bytes=found.optimizer_bytes,
                other_bytes=None if other is None or other < 0 else other,
            )
        )

    def is_due(self, guarded: Guarded | None) -> bool:
        """Whether there is more to do than to read: the plan has changed, or time has passed."""
        if self.latest is None:
            return False
        changed = guarded is not None and guarded.plan is not self._plan
        return changed or self.latest.time_s >= self._due_s

    def show(self, guarded: Guarded | None) -> None:
        """Put the latest reading on the progress bar, which draws it when it moves next."""
        if self.latest is None:
            return
        self._due_s = self.latest.time_s + _SHOW_EVERY_S
        self._plan = None if guarded is None else guarded.plan
        bar = live.bar(self.callbacks)
        if bar is not None:
            told = live.text(self.latest, self.series.card_total_bytes, self._plan)
            bar.set_postfix_str(told, refresh=False)

    def is_old(self) -> bool:
        """Whether the file is older than half a minute."""
        return self._due_s - self._written_s >= _WRITE_EVERY_S

    def write(self) -> None:
        """Write the file; where that fails, the next try is as far away as after a success."""
        self._written_s = self.series.time_s
        self.series.save(self.path)


@contextmanager
def recorded(trainer: Any, guarded: Guarded) -> Iterator[None]:
    """Have the trainer's recorder know the guard, and the trainer have one for as long if none."""
    own = next((c for c in trainer.callback_handler.callbacks if isinstance(c, VRAMRecorder)), None)
    recorder = VRAMRecorder() if own is None else own
    if own is None:
        trainer.add_callback(recorder)
    recorder.guarded = guarded
    try:
        yield
    finally:
        recorder.close()
        recorder.guarded = None
        if own is None:
            trainer.pop_callback(recorder)
