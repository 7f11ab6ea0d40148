"""What each rung saves and costs, on a small Llama on the CPU, with LoRA or all weights trained.

    python -m benchmarks.rung_memory

A training runs out of memory in its first forward pass, as often as it takes for the ladder to come
down, and goes on. Printed is the peak of live tensors in the two steps that
follow, less the weights, and the CPU time of a step, both relative to the training as it was.
"""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, field
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

from oomguard import (
    CheckpointActivations,
    Guard,
    HalveSequence,
    Ladder,
    LowerRank,
    NarrowTargets,
    PageOptimizer8bit,
    SplitBatch,
)
from oomguard.testing import VirtualCard
from tests import tiny

LAYERS = 8


@dataclass(frozen=True)
class Setting:
    """What is trained, and the ladders that are tried on it, each with its number of failures.

    Attributes:
        rank: Of LoRA on all linear layers; `None` trains all weights.
        rows: Of a batch, each of `length` tokens.
        length: Tokens of a row.
        hidden_size: Of the model.
        cases: By the name of the row in the table.
    """

    rank: int | None
    rows: int
    length: int
    hidden_size: int
    cases: dict[str, tuple[Ladder, int]] = field(repr=False)

    @property
    def title(self) -> str:
        """What stands above its table."""
        trained = "all weights" if self.rank is None else f"LoRA r={self.rank}"
        size = f"{LAYERS} layers of {self.hidden_size}"
        return f"{size}, {trained}, {self.rows} x {self.length} tokens"


ADAPTERS = {
    "as it was": (Ladder(CheckpointActivations()), 0),
    "CheckpointActivations": (Ladder(CheckpointActivations()), 1),
    "HalveSequence": (Ladder(HalveSequence()), 1),
    "SplitBatch, 4 rows a pass": (Ladder(SplitBatch()), 1),
    "SplitBatch, 1 row a pass": (Ladder(SplitBatch()), 3),
    "both, 4 rows a pass": (Ladder(CheckpointActivations(), SplitBatch()), 2),
    "both, 1 row a pass": (Ladder(CheckpointActivations(), SplitBatch()), 4),
    "NarrowTargets, all but q_proj and v_proj": (Ladder(NarrowTargets(at_once=True)), 1),
    "LowerRank, half": (Ladder(LowerRank()), 1),
}
STATE = {
    "as it was": (Ladder(PageOptimizer8bit()), 0),
    "PageOptimizer8bit": (Ladder(PageOptimizer8bit()), 1),
}
WIDE = {
    "as it was": (Ladder(LowerRank()), 0),
    "PageOptimizer8bit": (Ladder(PageOptimizer8bit()), 1),
    "NarrowTargets, all but q_proj and v_proj": (Ladder(NarrowTargets(at_once=True)), 1),
    "LowerRank, half": (Ladder(LowerRank()), 1),
}
SETTINGS = (
    Setting(rank=16, rows=8, length=512, hidden_size=128, cases=ADAPTERS),
    Setting(rank=64, rows=1, length=128, hidden_size=128, cases=WIDE),
    Setting(rank=None, rows=1, length=64, hidden_size=256, cases=STATE),
)


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


def make_trainer(setting: Setting, folder: str, steps: int) -> Any:
    """A training on rows of exactly `setting.length` tokens of real text."""
    ids = [token for row in tiny.tokenizer()(list(tiny.texts())).input_ids for token in row]
    length, count = setting.length, setting.rows * steps
    rows = [ids[start : start + length] for start in range(0, count * length, length)]
    hidden = setting.hidden_size
    model: Any = tiny.llama(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=LAYERS
    )
    if setting.rank is not None:
        lora = LoraConfig(r=setting.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=setting.rows,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False)
    return Trainer(model, args, collator, Dataset.from_dict({"input_ids": rows}))


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


def measure(setting: Setting, ladder: Ladder, failures: int) -> tuple[int, float]:
    """Peak bytes above the weights, and CPU seconds of the fastest step after the first."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(setting, folder, steps=2)
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
        trainer = make_trainer(setting, folder, steps=6)
        fail_in_forward(trainer.model, failures)
        times = StepTimes()
        trainer.add_callback(times)
        with Guard(trainer, ladder=ladder):
            trainer.train()
    return peak_bytes, min(times.seconds[1:])


def table(setting: Setting) -> Table:
    """All cases of a setting."""
    rows = Table(title=setting.title)
    for name in ("rungs", "peak above weights", "memory", "time of a step"):
        rows.add_column(name, justify="left" if name == "rungs" else "right")
    reference: tuple[int, float] | None = None
    for name, (ladder, failures) in setting.cases.items():
        peak_bytes, seconds = measure(setting, ladder, failures)
        reference = reference or (peak_bytes, seconds)
        rows.add_row(
            name,
            f"{peak_bytes / 2**20:.1f} MiB",
            f"{peak_bytes / reference[0]:.2f}",
            f"{seconds / reference[1]:.1f}",
        )
    return rows


def main() -> None:
    """Measure all settings and print their tables."""
    logging.getLogger("oomguard").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for setting in SETTINGS:
        rich.print(table(setting))


if __name__ == "__main__":
    main()
