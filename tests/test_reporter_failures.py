"""The reporter where something fails: it is told once, and training goes on."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import PrinterCallback

import oomguard
from oomguard.watch.series import FILE_NAME, Series
from tests import tiny
from tests.failures import WRITING, unreadable_card
from tests.reporting import make, vram

WARNING = "this is said once"


@pytest.mark.parametrize("failure", WRITING, ids=lambda failure: str(failure.__name__))
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


def test_memory_that_cannot_be_read_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, plain = make(tmp_path, oomguard.VRAMReporter()), make(tmp_path)
    plain.train()
    with caplog.at_level(logging.WARNING, "oomguard"), unreadable_card():
        trainer.train()
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
from tests.reporting import Fails, make
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
