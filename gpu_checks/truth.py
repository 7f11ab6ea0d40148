"""Peaks of real training runs on a CUDA GPU, for `benchmarks/prediction.py` to compare with.

    python -m gpu_checks.truth --out truth.json --shape qwen3-0.6b mixtral gemma3

Every run is a process of its own: what an earlier one leaves behind, such as the workspaces of
cuBLAS, would shift its figures. It loads a model with random weights from a folder, as a user's is,
and makes a few optimizer steps. A row holds the configuration, the plan and the settings as
`oomguard.estimate` takes them, what the allocator counted in each step, and the estimate. Rows are
written as they are made, and printed at the end. `--tiny` runs the same on the CPU with small
shapes, and shows no peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from gpu_checks.truth_runs import RUNS, SHAPES, TINY, request
from gpu_checks.truth_trainer import Peaks, loaded, trainer_of
from oomguard.memory.size import format_bytes
from oomguard.prediction.predictor import Predictor
from oomguard.report import installed_versions

_OPTIMIZERS_OF_CARDS = ("paged", "8bit")


def shape_of(name: str, tiny: bool) -> dict[str, Any]:
    """The configuration of a shape, as JSON types."""
    values = dict(SHAPES[name])
    if tiny:
        values |= {key: value for key, value in TINY.items() if key in values or "n_" in key}
    return values


def config_of(values: dict[str, Any]) -> Any:
    """The configuration itself."""
    config = CONFIG_MAPPING[values["model_type"]](
        **{name: value for name, value in values.items() if name != "model_type"}
    )
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 1, 2, None
    return config


def runs_of(shape: str, tiny: bool) -> list[dict[str, Any]]:
    """The runs of a shape; on the CPU short ones, without what needs a card."""
    if not tiny:
        return RUNS[shape]
    runs = [{**run, "max_length": 32} for run in RUNS[shape]]
    for run in runs:
        if any(word in run.get("optim", "") for word in _OPTIMIZERS_OF_CARDS):
            run["optim"] = "adamw_torch"
    return runs


def save(config: Any, folder: Path) -> None:
    """A model with random weights, as a user would have downloaded it."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def tokenizer_of(words: int) -> Any:
    """One token a word."""
    vocabulary = {f"t{i}": i for i in range(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")),
        pad_token="t1",
        eos_token="t2",
    )


def measure(folder: Path, values: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    plan, settings = request(run)
    row: dict[str, Any] = {"plan": plan.to_dict(), "settings": asdict(settings)}
    peaks, cuda = Peaks(), torch.cuda.is_available()
    try:
        model = loaded(folder, settings)
        if cuda:
            row["loaded_alloc"] = torch.cuda.memory_allocated()
        with tempfile.TemporaryDirectory() as output:
            tokenizer = tokenizer_of(values.get("vocab_size", 50257))
            trainer = trainer_of(model, plan, settings, tokenizer, peaks, output)
            del model
            if cuda:
                row["start_alloc"] = torch.cuda.memory_allocated()
            trainer.train()
        row["steps"] = peaks.rows
    except torch.OutOfMemoryError as error:
        row["oom"] = str(error)[:200]
    except Exception as error:  # noqa: BLE001 - a run that fails is a row too
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    card = torch.cuda.get_device_name() if cuda else "host"
    try:
        found = Predictor(config_of(values), settings).at(plan, card)
        row["estimate"] = {
            "method": found.method,
            "notes": list(found.notes),
            "peak_allocated_bytes": found.peak_allocated_bytes,
            "peak_reserved_bytes": found.peak_reserved_bytes,
        }
    except Exception as error:  # noqa: BLE001 - nor does an estimate that fails end the others
        row["estimate"] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return row


def heading() -> dict[str, Any]:
    """The device and the versions."""
    found: dict[str, Any] = {
        "device": "cpu",
        "versions": installed_versions(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
        free, total = torch.cuda.mem_get_info()
        found["device"] = torch.cuda.get_device_name()
        found["context_bytes"] = total - free - torch.cuda.memory_reserved()
        found["total"] = total
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """Measured peaks beside estimated ones."""
    out = Table("run", "allocated", "estimated", "", "reserved", "estimated", "")
    for row in rows:
        if "plan" not in row:
            out.add_row(row["model"], row["error"])
            continue
        asked = {**row["plan"], **row["settings"]}
        said = ("quantization", "lora_r", "gradient_checkpointing", "max_length", "padded")
        name = " ".join([row["model"], *(f"{key}={asked[key]}" for key in said if asked[key])])
        cells = [row.get("error") or row.get("oom") or row["estimate"].get("error") or ""]
        if not cells[0] and "peak_alloc" in row["steps"][-1]:
            cells = []
            for key, short in (("allocated", "peak_alloc"), ("reserved", "peak_reserved")):
                measured = max(step[short] for step in row["steps"])
                guess = row["estimate"][f"peak_{key}_bytes"]
                cells += [
                    format_bytes(measured),
                    format_bytes(guess),
                    f"{guess / measured - 1:+.2%}",
                ]
        out.add_row(name, *cells)
    return out


def in_memory() -> str | None:
    """A folder that is no disk, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def child(what: str, folder: Path, tiny: bool) -> None:
    """One process: the heading, a model to save, or a run, as JSON on standard output."""
    shape, _, number = what.partition(":")
    if what == "heading":
        found = heading()
    elif not number:
        save(config_of(shape_of(shape, tiny)), folder / shape)
        found = {"saved": shape}
    else:
        values = shape_of(shape, tiny)
        run = runs_of(shape, tiny)[int(number)]
        found = {"model": shape, "config": values, **measure(folder / shape, values, run)}
    (folder / f"{what}.json").write_text(json.dumps(found))


def spawned(what: str, folder: Path, tiny: bool) -> Any:
    """What a process of its own found."""
    command = [sys.executable, "-m", "gpu_checks.truth", "--out", str(folder), "--child", what]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    tail = ["--tiny"] if tiny else []
    done = subprocess.run([*command, *tail], check=False, env=environment)  # noqa: S603 - our own module
    written = folder / f"{what}.json"
    if written.exists():
        return json.loads(written.read_text())
    return {"model": what, "error": f"its process ended with {done.returncode}"}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", required=True)
    parser.add_argument("--at-once", type=int, default=4, help="processes, on the one card")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child is not None:
        child(chosen.child, chosen.out, chosen.tiny)
        return
    with (
        tempfile.TemporaryDirectory(dir=in_memory()) as name,
        ThreadPoolExecutor(chosen.at_once) as pool,
    ):
        folder = Path(name)
        made = list(pool.map(lambda w: spawned(w, folder, chosen.tiny), ["heading", *chosen.shape]))
        found = made[0]
        work = [f"{s}:{i}" for s in chosen.shape for i in range(len(runs_of(s, chosen.tiny)))]
        for row in pool.map(lambda w: spawned(w, folder, chosen.tiny), work):
            found["rows"].append(row)
            chosen.out.write_text(json.dumps(found))
    Console(width=150).print(table(found["rows"]))


if __name__ == "__main__":
    main()
