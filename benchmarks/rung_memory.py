"""What each rung saves and costs, on a small Llama with LoRA on the CPU.

    python -m benchmarks.rung_memory

A training of 8 rows x 512 tokens runs out of memory in its first forward pass, as often as it takes
for the ladder to come down, and goes on. Printed is the peak of live tensors in the two steps that
follow, less the weights, and the CPU time of a step, both relative to the training as it was.
"""

from __future__ import annotations

import logging
import tempfile
import time
from typing import Any

import rich
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from oomguard import CheckpointActivations, Guard, HalveSequence, Ladder, SplitBatch
from oomguard.testing import VirtualCard
from tests import tiny

ROWS, LENGTH, LAYERS = 8, 512, 8
CASES: dict[str, tuple[Ladder, int]] = {
    "as it was": (Ladder(CheckpointActivations()), 0),
    "CheckpointActivations": (Ladder(CheckpointActivations()), 1),
    "HalveSequence": (Ladder(HalveSequence()), 1),
    "SplitBatch, 4 rows a pass": (Ladder(SplitBatch()), 1),
    "SplitBatch, 1 row a pass": (Ladder(SplitBatch()), 3),
    "both, 4 rows a pass": (Ladder(CheckpointActivations(), SplitBatch()), 2),
    "both, 1 row a pass": (Ladder(CheckpointActivations(), SplitBatch()), 4),
}


class StepTimes(TrainerCallback):
    """CPU seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Read it."""
        self.seconds.append(time.process_time() - self._began)


def make_trainer(folder: str, steps: int) -> Any:
    """A training on rows of exactly `LENGTH` tokens of real text."""
    ids = [token for row in tiny.tokenizer()(list(tiny.texts())).input_ids for token in row]
    rows = [ids[start : start + LENGTH] for start in range(0, ROWS * steps * LENGTH, LENGTH)]
    model = tiny.llama(hidden_size=128, intermediate_size=344, num_hidden_layers=LAYERS)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)
    data = Dataset.from_dict({"input_ids": rows})
    return Trainer(get_peft_model(model, lora), args, collator, data)


def fail_in_forward(model: torch.nn.Module, times: int) -> None:
    """Let the first `times` training passes run out of memory."""
    left = times

    def fail(*_: Any) -> None:
        nonlocal left
        if left and torch.is_grad_enabled():
            left -= 1
            msg = "CUDA out of memory. Raised by a benchmark."
            raise torch.OutOfMemoryError(msg)

    model.register_forward_pre_hook(fail)


def measure(ladder: Ladder, failures: int) -> tuple[int, float]:
    """Peak bytes above the weights, and CPU seconds of the fastest step after the first."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, steps=2)
        fail_in_forward(trainer.model, failures)
        with VirtualCard(capacity_bytes="1TiB") as card:
            card.track(trainer.model)
            weights = card.live_bytes
            with Guard(trainer, ladder=ladder) as guard:
                trainer.train()
        if len(guard.report.recoveries) != failures:
            msg = f"{len(guard.report.recoveries)} recoveries, not {failures}"
            raise RuntimeError(msg)
        peak_bytes = card.peak_bytes - weights
        trainer = make_trainer(folder, steps=6)
        fail_in_forward(trainer.model, failures)
        times = StepTimes()
        trainer.add_callback(times)
        with Guard(trainer, ladder=ladder):
            trainer.train()
    return peak_bytes, min(times.seconds[1:])


def main() -> None:
    """Measure all cases and print the table."""
    logging.getLogger("oomguard").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    table = Table(title=f"{LAYERS} layers, LoRA r=16, {ROWS} rows x {LENGTH} tokens")
    for name in ("rungs", "peak above weights", "memory", "time of a step"):
        table.add_column(name, justify="left" if name == "rungs" else "right")
    reference: tuple[int, float] | None = None
    for name, (ladder, failures) in CASES.items():
        peak_bytes, seconds = measure(ladder, failures)
        reference = reference or (peak_bytes, seconds)
        table.add_row(
            name,
            f"{peak_bytes / 2**20:.0f} MiB",
            f"{peak_bytes / reference[0]:.2f}",
            f"{seconds / reference[1]:.1f}",
        )
    rich.print(table)


if __name__ == "__main__":
    main()
