"""The runs that `docs/rules-of-thumb.md` holds rules against.

    python -m benchmarks.rules [DATA.json]

`python -m gpu_checks.truth --shape llama3-8b mistral-7b llama32-1b --at-once 1 --out rules.json`
made them. Seconds are the median of the steps after the first.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.prediction import DATA
from oomguard.memory.size import format_bytes

COLUMNS = ("model", "trained", "rows x length", "checkpoints", "loaded", "allocated", "s a step")


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    plan, settings = row["plan"], row["settings"]
    base = settings.get("quantization") or settings.get("dtype", "bfloat16")
    named = plan.get("target_modules") or []
    where = "all-linear" if named == ["all-linear"] else ", ".join(n[0] for n in named)
    trained = f"LoRA r={plan['lora_r']} on {where}" if named else f"full, {plan['optim']}"
    peak, seconds = "out of memory", ""
    if "oom" not in row:
        peak = format_bytes(row["peak_allocated_bytes"])
        seconds = f"{statistics.median(row['step_seconds'][1:]):.2f}"
    return [
        f"{row['model']} {base}",
        trained,
        f"{plan['per_device_train_batch_size']} x {plan['max_length']}",
        "yes" if plan["gradient_checkpointing"] else "no",
        format_bytes(row["loaded_bytes"]),
        peak,
        seconds,
    ]


def main() -> None:
    """Print the table."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA / "h100-rules.json"
    table = Table(*COLUMNS, box=box.MARKDOWN)
    for row in json.loads(path.read_text())["rows"]:
        table.add_row(*cells(row))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
