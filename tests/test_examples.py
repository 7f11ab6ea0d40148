"""The examples run as a user would run them, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oomguard.report import Report
from tests import tiny

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart.py"


def run_quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    """The quickstart on the CPU, which writes to `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),  # an installed oomguard might be another version
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # two threads wait for each other where cores are shared
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    return subprocess.run(  # noqa: S603 - it is our own script
        [sys.executable, str(QUICKSTART)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_has_at_most_60_lines(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 60


@tiny.needs_activation_checkpointing
def test_the_quickstart_takes_or_passes_over_every_rung_and_learns(tmp_path: Path) -> None:
    done = run_quickstart(tmp_path)
    assert done.returncode == 0, done.stderr
    report = Report.load(tmp_path / "outputs" / "quickstart" / "oomguard.json")
    assert report.status == "finished"
    assert report.plan.effective_batch_size == report.initial_plan.effective_batch_size
    of_passes = ("CheckpointActivations", "HalveSequence", "SplitBatch")
    taken = [recovery.rung for recovery in report.recoveries if recovery.rung is not None]
    passed_over = {one.rung for recovery in report.recoveries for one in recovery.passed_over}
    assert set(taken) | passed_over == set(of_passes)
    for rung in taken:
        assert re.search(rf"^\d+ .* {rung} ", done.stdout, re.MULTILINE), done.stdout
    assert "Traceback" not in done.stderr
    losses = re.search(r"^eval loss ([\d.]+) -> ([\d.]+)$", done.stdout, re.MULTILINE)
    assert losses, done.stdout
    assert float(losses[2]) < float(losses[1]) - 1
