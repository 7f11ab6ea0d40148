"""Estimates against measured peaks.

    python benchmarks/prediction.py [--rows N] [DATA.json ...]

The rows of `benchmarks/data` are real training runs on one H100; `gpu_checks.truth` and runs like
it made them. In some a model was trained that an earlier trainer had trained before: accelerate
prepares a model once, so these ran without autocast, and their settings say so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import CONFIG_MAPPING

from oomguard.plan import Plan
from oomguard.prediction.predictor import Predictor
from oomguard.prediction.settings import Settings

DATA = Path(__file__).parent / "data"
CARD = "H100 80GB HBM3"


def config_of(values: dict[str, Any]) -> Any:
    """The configuration of a model of the data."""
    rest = {name: value for name, value in values.items() if name != "model_type"}
    return CONFIG_MAPPING[values["model_type"]](**rest)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of either form: with their configuration, and one peak of all steps."""
    found = json.loads(path.read_text())
    rows = []
    for row in found["rows"]:
        if "error" in row:
            continue
        steps = row.get("steps")
        peaks = {}
        if steps:
            peaks["peak_allocated_bytes"] = max(step["peak_alloc"] for step in steps)
            peaks["peak_reserved_bytes"] = max(step["peak_reserved"] for step in steps)
        config = row.get("config") or found["models"][row["model"]]
        rows.append({**row, **peaks, "config": config})
    return rows


def estimated(row: dict[str, Any]) -> Any:
    """The estimate of a row."""
    predictor = Predictor(config_of(row["config"]), Settings(**row["settings"]))
    return predictor.at(Plan.from_dict(row["plan"]), CARD)


def compare(rows: list[dict[str, Any]]) -> tuple[dict[str, list[Any]], list[str]]:
    """Relative errors by model, and the runs that did not fit and were said to."""
    errors: dict[str, list[Any]] = defaultdict(list)
    wrong = []
    for index, row in enumerate(rows):
        found = estimated(row)
        sys.stderr.write(f"\r{index + 1}/{len(rows)}")
        if "peak_allocated_bytes" not in row:
            if found.fits(CARD):
                wrong.append(f"{row['model']} {row['plan']}")
            continue
        allocated = found.peak_allocated_bytes / row["peak_allocated_bytes"] - 1
        reserved = found.peak_reserved_bytes / row["peak_reserved_bytes"] - 1
        kind = row["settings"].get("quantization") or row["settings"].get("dtype", "bfloat16")
        tuned = "LoRA" if row["plan"].get("lora_r") else "full"
        errors[f"{row['model']} {kind} {tuned}"].append((allocated, reserved))
    sys.stderr.write("\n")
    return errors, wrong


def table(errors: dict[str, list[Any]]) -> Table:
    """Mean and worst absolute errors by model."""
    out = Table("model", "runs", "allocated mean", "worst", "reserved mean", "worst")
    out.box = box.MARKDOWN
    everything = [pair for pairs in errors.values() for pair in pairs]
    for name, pairs in [*sorted(errors.items()), ("all", everything)]:
        cells = []
        for column in zip(*pairs, strict=True):
            sizes = [abs(value) for value in column]
            cells += [f"{statistics.mean(sizes):.2%}", f"{max(column, key=abs):+.2%}"]
        out.add_row(name, str(len(pairs)), *cells)
    return out


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="*", default=sorted(DATA.glob("*.json")))
    parser.add_argument("--rows", type=int, help="every so many rows only, to be quick")
    chosen = parser.parse_args()
    rows = [row for path in chosen.data for row in rows_of(path)]
    rows = rows[:: max(1, len(rows) // chosen.rows)] if chosen.rows else rows
    errors, wrong = compare(rows)
    console = Console(width=110)
    console.print(table(errors))
    console.print(f"runs that did not fit and were said to: {len(wrong)}")
    for line in wrong:
        console.print(line)


if __name__ == "__main__":
    main()
