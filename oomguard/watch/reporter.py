"""A callback that puts a run's memory into its logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oomguard.watch.quiet import Quiet
from oomguard.watch.readings import Reading
from oomguard.watch.recorder import VRAMRecorder

if TYPE_CHECKING:
    from oomguard.watch.readings import Peaks

_GIB = 2**30
_NOT_LOGGED = {"step", "time_s", "phase"}


class VRAMReporter(VRAMRecorder):
    """Reports a run's memory: in its logs, in a file, and on the progress bar.

        trainer.add_callback(oomguard.VRAMReporter())

    The log lines of training steps get `vram/allocated_gib`, `vram/peak_allocated_gib` and so on,
    as `Reading` names them, for TensorBoard, W&B, trackio and every other `report_to`, which put
    `train/` before them. Peaks are the highest since the last line, the rest is as of its step.
    To be heard by all of them it moves itself to the front of the trainer's callbacks when training
    begins. The whole series is in `oomguard_vram.parquet` in `args.output_dir`.

    Training comes out as without it. One thing does change: PyTorch's peak counters start anew
    at every step, so `torch.cuda.max_memory_allocated()` tells the peak since the last one only.
    With `skip_memory_metrics=False`, whose figures are those counters, they are left alone, and
    the peak of a step is known only where it rose above all before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._logs = Quiet(f"{type(self).__name__} puts nothing into the logs")

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the log line of a training step."""
        if self._run is None or logs is None or "loss" not in logs:
            return
        with self._logs:
            reading = self._run.take_since_logged()
            found = {} if reading is None else logged(reading)
            logs.update(found)
            # Trainer.log has put a copy there before it calls the callbacks.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(found)

    def _peaks_for(self, args: Any) -> Peaks:
        return "step" if args.skip_memory_metrics else "risen"


def logged(reading: Reading) -> dict[str, float]:
    """What is known of a reading, as entries of a log line: sizes in GiB."""
    found: dict[str, float] = {}
    for name in Reading._fields:
        value = getattr(reading, name)
        if name in _NOT_LOGGED or value is None:
            continue
        if name.endswith("_bytes"):
            found[f"vram/{name.removesuffix('_bytes')}_gib"] = value / _GIB
        else:
            found[f"vram/{name}"] = value
    return found
