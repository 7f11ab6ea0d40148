"""The reporter on real trainers: what it measures and where it puts it, and that it only looks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import oomguard
from oomguard.testing import VirtualCard
from oomguard.watch.reporter import logged
from oomguard.watch.series import FILE_NAME, Series
from tests import tiny, twin
from tests.reporting import Heard, make, vram

if TYPE_CHECKING:
    from pathlib import Path

MIB, GIB = 2**20, 2**30


def test_the_file_holds_every_step_evaluation_and_save(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer = make(tmp_path, oomguard.VRAMReporter(), **changes)
    with VirtualCard("1GiB") as card:
        card.track(trainer.model)
        trainer.train()
        peak = card.peak_bytes
    series = Series.load(tmp_path / FILE_NAME)
    rows = series.readings
    kinds = [(row.step, row.phase) for row in rows]
    assert kinds == [
        *((1, "train"), (2, "train"), (2, "eval"), (3, "train")),
        *((4, "train"), (4, "eval"), (4, "save")),
    ]
    assert (series.device, series.card_total_bytes) == ("VirtualCard", GIB)
    assert max(row.peak_allocated_bytes or 0 for row in rows) == peak
    assert all((row.peak_allocated_bytes or 0) >= (row.allocated_bytes or GIB) for row in rows)
    assert all(row.host_rss_bytes for row in rows)
    assert [row.time_s for row in rows] == sorted(row.time_s for row in rows)
    assert [entry.step for entry in series.breakdowns] == [1, 2, 4]
    trained = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
    assert series.breakdowns[-1].gradients_bytes == trained
    assert series.breakdowns[-1].optimizer_bytes > 2 * trained
    assert (series.breakdowns[-1].other_bytes or 0) > 0
    assert not trainer.model._forward_pre_hooks


def test_the_tokens_of_a_step_are_those_of_its_batches(tmp_path: Path) -> None:
    trainer = make(tmp_path, oomguard.VRAMReporter(), dataset=twin.short_texts(32))
    collate, batches = trainer.data_collator, []

    def counting(rows: Any) -> Any:
        batch = collate(rows)
        batches.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    trainer.train()
    rows = Series.load(tmp_path / FILE_NAME).readings
    assert [row.batch_tokens for row in rows] == [
        one + other for one, other in zip(batches[::2], batches[1::2], strict=True)
    ]
    assert len(set(batches)) > 1


class Spike(TrainerCallback):
    """Needs much memory for a moment, before the first step only."""

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            torch.zeros(200 * MIB, dtype=torch.uint8)


def test_every_log_line_of_a_step_has_the_readings_wherever_it_goes(tmp_path: Path) -> None:
    heard = Heard()
    trainer = make(tmp_path, heard, Spike(), logging_steps=2, eval_strategy="steps", eval_steps=3)
    trainer.add_callback(oomguard.VRAMReporter())
    with VirtualCard("1GiB"):
        torch.zeros(600 * MIB, dtype=torch.uint8)  # before training: the peak of no step
        trainer.train()
    rows = [row for row in Series.load(tmp_path / FILE_NAME).readings if row.phase == "train"]
    lines = [line for line in heard.lines if "loss" in line]
    assert len(lines) == 2
    for line, (before, last) in zip(lines, (rows[:2], rows[2:]), strict=True):
        found = vram(line)
        peak = max(before.peak_allocated_bytes or 0, last.peak_allocated_bytes or 0)
        assert found.pop("vram/peak_allocated_gib") == peak / GIB
        expected = logged(last)
        del expected["vram/peak_allocated_gib"]
        assert found == expected
    assert set(vram(lines[0])) == {
        "vram/allocated_gib",
        "vram/peak_allocated_gib",
        "vram/batch_tokens",
        "vram/host_rss_gib",
    }
    assert 0.5 > lines[0]["vram/peak_allocated_gib"] > 2 * lines[1]["vram/peak_allocated_gib"]
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert [vram(line) for line in history] == [vram(line) for line in lines]
    others = [vram(line) for line in heard.lines if "loss" not in line]
    assert others
    assert not any(others)


def test_a_tensorboard_file_has_the_readings(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make(tmp_path, report_to="tensorboard", logging_steps=2)
    trainer.add_callback(oomguard.VRAMReporter())
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = reader.EventAccumulator(str(file))
    events.Reload()
    told = [event.value for event in events.Scalars("train/vram/host_rss_gib")]
    assert told == pytest.approx(
        [line["vram/host_rss_gib"] for line in trainer.state.log_history if "loss" in line]
    )


def reported(folder: Path) -> Trainer:
    trainer = twin.sft(folder)
    trainer.add_callback(oomguard.VRAMReporter())
    return trainer


def without_vram(run: twin.Run) -> twin.Run:
    run.logs = [{k: v for k, v in line.items() if not k.startswith("vram/")} for line in run.logs]
    return run


def test_training_comes_out_as_without_it_bit_for_bit() -> None:
    twin.assert_same(without_vram(twin.run(reported)), twin.twin(twin.sft), twin.EXACT)


def test_an_error_recovered_from_under_it_leaves_no_trace_either() -> None:
    run = twin.run(reported, twin.CHECKPOINT, {("backward", 2): 40})
    twin.assert_same(without_vram(run), twin.twin(twin.sft), twin.EXACT)


def test_only_the_main_process_reports(tmp_path: Path) -> None:
    trainer = make(tmp_path, oomguard.VRAMReporter(), max_steps=1)
    trainer.state.is_world_process_zero = False
    trainer.is_world_process_zero = lambda: False
    trainer.train()
    assert not (tmp_path / FILE_NAME).exists()
    assert not any(vram(line) for line in trainer.state.log_history)


def test_a_compiled_training_has_no_hook(tmp_path: Path) -> None:
    trainer = make(tmp_path, oomguard.VRAMReporter(), Hooks(), max_steps=1)
    trainer.args.torch_compile = True  # as of here nothing else reads it
    trainer.train()
    assert Hooks.seen == [0]
    assert Series.load(tmp_path / FILE_NAME).readings[0].batch_tokens is None


class Hooks(TrainerCallback):
    """Counts the hooks before the model's forward pass."""

    seen: list[int] = []  # noqa: RUF012

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen[:] = [len(model._forward_pre_hooks)]


class Line(torch.nn.Module):
    """As small as a model can be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight(x)[:, 0] - labels).square().mean()}


@pytest.mark.slow
def test_over_twenty_thousand_steps_file_and_memory_stay_bounded(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"x": [[0.0, 1.0]] * 64, "labels": [1.0] * 64})
    changes = {"max_steps": 20_000, "logging_steps": 2000, "gradient_accumulation_steps": 1}
    arguments = TrainingArguments(str(tmp_path), **{**tiny.ARGUMENTS, **changes})
    trainer = Trainer(Line(), arguments, train_dataset=rows)
    trainer.add_callback(oomguard.VRAMReporter())
    trainer.train()
    readings = Series.load(tmp_path / FILE_NAME).readings
    assert readings[-1].step == 20_000
    assert len(readings) <= 3072
    assert (tmp_path / FILE_NAME).stat().st_size < 512 * 1024
    host = [row.host_rss_bytes or 0 for row in readings if row.step > 4000]
    assert max(host) - min(host) < 8 * MIB, "the host's memory grew with the steps"
