"""A run on a virtual card, its report, and the picture of it in docs/report.md.

    python -m benchmarks.report_page

A small Llama with LoRA is trained for 60 steps on rows of very different lengths, evaluated and
saved now and then, on a card that is too small for the longest batches. The page is opened in a
headless Chromium for the picture.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import oomguard
from oomguard.testing import VirtualCard
from tests import tiny
from tests.browser import CHROMIUM, FLAGS

PICTURE = Path(__file__).parents[1] / "docs" / "report.png"
CARD, SEED = "340MiB", 4  # with which the longest batches come late
WINDOW = "1200,1030"  # down to the end of the timeline


def train(folder: Path) -> None:
    """Train under the guard; the report and the readings are in `folder` then."""
    trainer: Any = tiny.sft_trainer(
        folder,
        dataset=tiny.text_dataset(480),
        trainer_arguments={"eval_dataset": tiny.text_dataset(24)},
        max_steps=60,
        max_length=512,
        seed=SEED,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=1,
        eval_strategy="steps",
        eval_steps=15,
        save_strategy="steps",
        save_steps=20,
        save_total_limit=1,
        learning_rate=1e-3,
    )
    trainer.add_callback(oomguard.LeakDetector())
    with VirtualCard(capacity_bytes=CARD) as card:
        card.track(trainer.model)
        oomguard.fit(trainer, ladder="exact_first")


def photograph(page: Path, picture: Path) -> None:
    """A picture of the top of the page."""
    if CHROMIUM is None:
        sys.exit("There is no Chromium here, which makes the picture: apt-get install chromium.")
    command = [CHROMIUM, *FLAGS, f"--window-size={WINDOW}", f"--screenshot={picture}"]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True)  # noqa: S603


def main() -> None:
    """Make the run, the page and the picture."""
    folder = Path("outputs") / "llama-lora"
    shutil.rmtree(folder, ignore_errors=True)
    train(folder)
    subprocess.run([sys.executable, "-m", "oomguard", "report", str(folder)], check=True)  # noqa: S603
    with tempfile.TemporaryDirectory() as elsewhere:
        picture = Path(elsewhere) / PICTURE.name
        photograph((folder / "oomguard.html").resolve(), picture)
        shutil.copy(picture, PICTURE)


if __name__ == "__main__":
    main()
