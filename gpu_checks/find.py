"""The plans that `find_plan` names without a GPU, trained on one cut down to the card.

    python -m gpu_checks.find --output find.json

For every model and card the largest plan is searched for on estimates alone, as on a laptop. Then
its model, random weights on the disk, is loaded and trained for two optimizer steps in a process of
its own, where PyTorch may have what CUDA's context leaves of the card. A plan that does not fit, or
takes less than nine tenths of its card, is a failure. Nothing else may run on the GPU meanwhile.
`--tiny` runs the same on the CPU, on `VirtualCard`s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import disable_progress_bars
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, TrainerCallback

from gpu_checks.card import GpuSession, VirtualSession
from gpu_checks.truth import config_of, heading, in_memory, save, tokenizer_of
from gpu_checks.truth_trainer import loaded, trainer_of
from gpu_checks.workload import LLAMA_1B, LLAMA_8B, TINY
from oomguard.errors import NothingFitsError
from oomguard.memory.cards import Card
from oomguard.memory.size import format_bytes, parse_bytes
from oomguard.plan import Plan
from oomguard.prediction.settings import Settings
from oomguard.search import Finder
from oomguard.testing import VirtualCard

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpu_checks.card import Session

Row = dict[str, Any]
SMOLLM2_360M = {
    "vocab_size": 49152,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "tie_word_embeddings": True,
}
_LORA: Row = {"lora_r": 16, "target_modules": ("all-linear",)}
_FULL: Row = {"lora_r": None}
CASES: dict[str, tuple[Row, Row]] = {
    "llama3-8b nf4 LoRA": (LLAMA_8B, {**_LORA, "quantization": "nf4"}),
    "llama32-1b bf16 LoRA": (LLAMA_1B, _LORA),
    "smollm2-360m bf16 full": (SMOLLM2_360M, _FULL),
}
_FLOAT32: Row = {"dtype": "float32", "mixed_precision": "no"}
TINY_CASES: dict[str, tuple[Row, Row]] = {
    "LoRA": (TINY, {**_LORA, **_FLOAT32, "max_length": 64}),
    "full": (TINY, {**_FULL, **_FLOAT32, "max_length": 64}),
}
CARDS = ("8GiB", "12GiB", "16GiB", "24GiB")
TINY_CARDS = ("96MiB", "128MiB")
ENOUGH = 0.9  # of the card


def planned(case: str, card: str, finder: Finder, *, tiny: bool) -> Row:
    """What is found for one card, as the child takes it."""
    row: Row = {"case": case, "card": card, "card_bytes": parse_bytes(card), "tiny": tiny}
    try:
        if tiny:
            with VirtualCard(card):
                found = finder.on()
        else:
            found = finder.on(card)
    except NothingFitsError as error:
        return {**row, "ended_by": str(error)}
    return {
        **row,
        "plan": found.plan.to_dict(),
        "settings": found.estimate.settings.to_dict(),
        "estimated_allocated_bytes": found.estimate.peak_allocated_bytes,
        "estimated_device_bytes": found.estimate.device_bytes,
        "found_in_s": found.seconds,
    }


def checked(case: str, cards: Sequence[str], timeout_s: float, *, tiny: bool) -> Iterator[Row]:
    """The rows of one model."""
    model, settings = (TINY_CASES if tiny else CASES)[case]
    asked = {"max_length": 1024, "per_device_train_batch_size": 1, **settings}
    finder = Finder(LlamaConfig(**model), "tokens", (), asked)
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        spawned("save", {"case": case, "folder": folder}, timeout_s)
        for card in cards:
            row = {**planned(case, card, finder, tiny=tiny), "folder": folder}
            if "plan" in row:
                row = spawned("train", row, timeout_s)
            del row["folder"]
            sys.stderr.write(f"{case} {card} {row.get('share') or row.get('ended_by')}\n")
            yield row


def saved(row: Row) -> Row:
    """Save the model of a case."""
    model = (CASES | TINY_CASES)[row["case"]][0]
    save(config_of({**model, "model_type": "llama"}), Path(row["folder"]))
    return {}


def spawned(does: str, row: Row, timeout_s: float) -> Row:
    """The row with what a process of its own has found."""
    command = [sys.executable, "-m", "gpu_checks.find", "--child", does]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command,
            input=json.dumps(row),
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**row, "ended_by": f"{timeout_s:.0f} s were over"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {**row, "ended_by": f"exit status {done.returncode}"}
    return {**row, **json.loads(lines[-1]), "process_s": time.perf_counter() - began}


def measure(row: Row) -> Row:
    """Train two steps of the plan of a row under the limit of its card."""
    model, settings = (CASES | TINY_CASES)[row["case"]][0], Settings(**row["settings"])
    config = config_of({**model, "model_type": "llama"})
    tokenizer = tokenizer_of(config.vocab_size)
    session: Session = VirtualSession() if row["tiny"] else GpuSession()
    found: Row = {"fitted": True}
    with session, tempfile.TemporaryDirectory() as output:
        session.limit(row["card_bytes"] - (0 if row["tiny"] else Card.of("H100").outside_bytes))
        session.peaks()
        try:
            made = loaded(Path(row["folder"]), settings)
            plan, watch = Plan.from_dict(row["plan"]), TrainerCallback()
            trainer = trainer_of(made, plan, settings, tokenizer, watch, output)
            del made
            trainer.train()
        except torch.OutOfMemoryError as error:
            found = {"fitted": False, "ended_by": str(error)[:200]}
        allocated_bytes, reserved_bytes = session.peaks()
        outside_bytes = session.outside_bytes or 0
    used = allocated_bytes if reserved_bytes is None else reserved_bytes
    return {
        **found,
        "peak_allocated_bytes": allocated_bytes,
        "peak_reserved_bytes": reserved_bytes,
        "context_bytes": outside_bytes,
        "device_bytes": used + outside_bytes,
        "share": (used + outside_bytes) / row["card_bytes"],
    }


def failures(rows: list[Row]) -> list[str]:
    """What must not be."""
    said = []
    for row in rows:
        name = f"{row['case']} on {row['card']}"
        if not row.get("fitted"):
            said.append(f"{name}: {row.get('ended_by', 'not trained')}")
        elif row["share"] > 1.0:
            said.append(f"{name}: {row['share']:.1%} of the card were in use")
        elif row["share"] < ENOUGH and not row["tiny"]:
            said.append(f"{name}: only {row['share']:.1%} of the card were in use")
    return said


def table(rows: list[Row]) -> Table:
    """A line for each plan."""
    columns = ("rows x length", "estimated", "measured", "of the card", "allocated off by", "")
    out = Table("model", "card", *columns, box=box.MARKDOWN)
    for row in rows:
        plan, cells = row.get("plan"), ["", "", "", "", "", row.get("ended_by", "")[:60]]
        if plan is not None:
            cells[0] = f"{plan['per_device_train_batch_size']} x {plan['max_length']}"
            cells[1] = format_bytes(row["estimated_device_bytes"])
        if row.get("fitted"):
            off = row["estimated_allocated_bytes"] / row["peak_allocated_bytes"] - 1
            cells[2:6] = (
                format_bytes(row["device_bytes"]),
                f"{row['share']:.1%}",
                f"{off:+.2%}",
                "fits",
            )
        out.add_row(row["case"], row["card"], *cells)
    return out


def main(arguments: list[str] | None = None) -> int:
    """Search, train, and print; the status is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="all rows as JSON")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--cases", nargs="*", help="these models only")
    parser.add_argument("--cards", nargs="*", help="these cards only, such as 8GiB")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of one training")
    parser.add_argument("--child", choices=("save", "train"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child is not None:
        disable_progress_bars()
        does = {"save": saved, "train": measure}[chosen.child]
        sys.stdout.write(json.dumps(does(json.loads(sys.stdin.read()))) + "\n")
        return 0
    cases = TINY_CASES if chosen.tiny else CASES
    cards = chosen.cards or (TINY_CARDS if chosen.tiny else CARDS)
    rows: list[Row] = []
    failed: list[str] = []
    for case in chosen.cases or cases:
        for row in checked(case, cards, chosen.timeout, tiny=chosen.tiny):
            rows.append(row)
            failed = failures(rows)
            if chosen.output is not None:  # after each, as a run may be cut
                chosen.output.write_text(json.dumps({"rows": rows, "failures": failed}))
    Console(width=140).print(table(rows))
    sys.stdout.writelines(f"FAILED {text}\n" for text in failed)
    if chosen.output is not None:  # CUDA starts here last: its context would count in every row
        chosen.output.write_text(json.dumps({**heading(), "rows": rows, "failures": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
