"""The reporter on real trainers: what it measures and where it puts it, and that it only looks."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import oomguard
from oomguard.ladder import Ladder
from oomguard.memory import simulated
from oomguard.testing import VirtualCard
from oomguard.watch.recorder import VRAMRecorder
from oomguard.watch.reporter import logged
from oomguard.watch.series import FILE_NAME, Series
from tests import tiny, twin

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB, GIB = 2**20, 2**30
WARNING = "this is said once"


class Heard(TrainerCallback):
    """Keeps what a callback in the place of an integration is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


def make(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Any:
    arguments = {"callbacks": list(callbacks), "eval_dataset": tiny.text_dataset(4)}
    return tiny.sft_trainer(folder, trainer_arguments=arguments, **changes)


def vram(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("vram/")}


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


class Fails(TrainerCallback):
    """Ends training at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            msg = "the user's own"
            raise ValueError(msg)


def test_a_resumed_run_goes_on_with_the_file_from_its_checkpoint(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 2}
    reporter = oomguard.VRAMReporter()
    trainer = make(tmp_path, reporter, Fails(3), **saves)
    with pytest.raises(ValueError, match="own"):
        trainer.train()
    reporter.close()
    first = Series.load(tmp_path / FILE_NAME).readings
    assert [(row.step, row.phase) for row in first][-1] == (3, "train")
    make(tmp_path, oomguard.VRAMReporter(), **saves).train(resume_from_checkpoint=True)
    rows = Series.load(tmp_path / FILE_NAME).readings
    assert rows[:3] == first[:3]
    assert [row.step for row in rows] == [1, 2, 2, 3, 4, 4]
    assert [row.time_s for row in rows] == sorted({row.time_s for row in rows})
    make(tmp_path, oomguard.VRAMReporter(), max_steps=1).train()
    assert [row.step for row in Series.load(tmp_path / FILE_NAME).readings] == [1]


def test_a_guarded_run_is_recorded_by_itself_and_logged_as_a_plain_one(tmp_path: Path) -> None:
    heard = Heard()
    trainer = make(tmp_path, heard, max_steps=3)
    before = list(trainer.callback_handler.callbacks)
    with VirtualCard("1GiB") as card:
        card.track(trainer.model)
        faults = VirtualCard(fail_at=60)
        trainer.add_callback(At(2, faults))
        report = oomguard.fit(trainer, ladder=Ladder(oomguard.SplitBatch()))
    assert [recovery.rung for recovery in report.recoveries] == ["SplitBatch"]
    rows = Series.load(tmp_path / FILE_NAME).readings
    assert [row.step for row in rows] == [1, 2, 3]
    assert [row.batch_tokens is None for row in rows] == [False, True, False]
    assert not any(vram(line) for line in heard.lines + trainer.state.log_history)
    assert trainer.callback_handler.callbacks[: len(before)] == before
    assert not any(isinstance(c, VRAMRecorder) for c in trainer.callback_handler.callbacks)


class At(TrainerCallback):
    """Has a card in force during one step."""

    def __init__(self, step: int, card: VirtualCard) -> None:
        self.step, self.card = step, card

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.card.__enter__()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.card.__exit__(None, None, None)


def test_the_guard_takes_the_reporter_that_is_there_and_writes_what_a_failed_run_read(
    tmp_path: Path,
) -> None:
    reporter = oomguard.VRAMReporter()
    trainer = make(tmp_path, reporter, Fails(2))
    with pytest.raises(ValueError, match="own"):
        oomguard.fit(trainer)
    assert [row.step for row in Series.load(tmp_path / FILE_NAME).readings] == [1, 2]
    assert reporter.guarded is None
    recorders = [c for c in trainer.callback_handler.callbacks if isinstance(c, VRAMRecorder)]
    assert recorders == [reporter]
    assert any(vram(line) for line in trainer.state.log_history)


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


@contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """Nobody may write to the folder, this process included."""
    folder.chmod(0o555)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o755)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """No file may grow beyond a kibibyte."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def file_in_the_way(folder: Path) -> Iterator[None]:
    """The output directory has become a file."""
    folder.rmdir()
    folder.touch()
    yield


@contextmanager
def no_parquet(folder: Path) -> Iterator[None]:
    """The package that writes the file cannot be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        yield


FAILURES = [no_permission, full_disk, file_in_the_way, no_parquet]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: str(failure.__name__))
def test_a_file_that_cannot_be_written_is_told_once_and_training_goes_on(
    caplog: pytest.LogCaptureFixture, failure: Any
) -> None:
    open_to_all = Path(tempfile.mkdtemp())  # that of pytest is not
    open_to_all.chmod(0o755)
    folder = open_to_all / "out"
    folder.mkdir()
    trainer = make(folder, oomguard.VRAMReporter())
    trainer.remove_callback(PrinterCallback)  # prints into a file of pytest, which may not grow
    with caplog.at_level(logging.WARNING, "oomguard"), failure(folder):
        trainer.train()
        trainer.train()
    told = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    assert len(told) == 1, told
    assert told[0].startswith("VRAMReporter does not write oomguard_vram.parquet: ")
    assert trainer.state.global_step == 4
    shutil.rmtree(open_to_all)
    assert all(vram(line) for line in trainer.state.log_history if "loss" in line)


class Broken:
    """A card that cannot be read."""

    capacity_bytes = None

    @property
    def allocated_bytes(self) -> int:
        msg = "the driver is gone"
        raise RuntimeError(msg)

    @property
    def peak_bytes(self) -> int:
        return self.allocated_bytes

    def take_peak(self) -> int:
        return self.allocated_bytes


def test_memory_that_cannot_be_read_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, plain = make(tmp_path, oomguard.VRAMReporter()), make(tmp_path)
    plain.train()
    card = Broken()
    simulated.enter(card)
    try:
        with caplog.at_level(logging.WARNING, "oomguard"):
            trainer.train()
    finally:
        simulated.leave(card)
    told = sorted(record.getMessage() for record in caplog.records)
    assert [text.partition(":")[0] for text in told] == [
        "VRAMReporter does not read memory",
        "VRAMReporter does not tell what the memory consists of",
    ]
    assert all("RuntimeError: the driver is gone" in text for text in told)
    assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(plain)) == 0
    assert Series.load(tmp_path / FILE_NAME).readings == []


@pytest.mark.slow
def test_a_script_that_dies_of_an_error_leaves_the_file(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
import oomguard
from tests.test_reporter import Fails, make
make(Path(sys.argv[1]), oomguard.VRAMReporter(), Fails(3)).train()
"""
    run = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("ValueError: the user's own"), run.stderr[-600:]
    assert [row.step for row in Series.load(tmp_path / FILE_NAME).readings] == [1, 2, 3]


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
