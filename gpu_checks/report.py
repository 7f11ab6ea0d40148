"""What a check prints and writes: its command, the setting, and a table for all that it found."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch

import oomguard
from gpu_checks.card import GpuSession, VirtualSession
from gpu_checks.sections import Bench, Result
from gpu_checks.workload import Scale
from oomguard.memory.size import format_bytes
from oomguard.oom import release
from oomguard.report import installed_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_UNITS = {"_s": " (s)", "_pct": " (%)", "_bytes": ""}


@dataclass(frozen=True)
class Check:
    """A command that runs sections and writes their tables.

    Attributes:
        module: What `python -m` runs.
        title: The heading of its tables.
        about: What it does, in one line.
        sections: What can be run, by name.
    """

    module: str
    title: str
    about: str
    sections: Mapping[str, Callable[[Bench], Result]]

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the chosen sections; returns the exit code."""
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}", description=self.about)
        parser.add_argument("--out", type=Path, help="where to write all rows as JSON")
        parser.add_argument("--markdown", type=Path, help="where to write the tables as Markdown")
        parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
        names = list(self.sections)
        parser.add_argument("--sections", nargs="+", choices=names, default=names)
        given = list(sys.argv[1:] if arguments is None else arguments)
        options = parser.parse_args(given)
        if not options.tiny and not torch.cuda.is_available():
            parser.error("there is no CUDA device; try the code with --tiny")
        datasets.disable_progress_bars()
        command = shlex.join(["python", "-m", self.module, *given])
        bench = Bench(VirtualSession if options.tiny else GpuSession, Scale(options.tiny))
        setting = {"command": command, **environment(tiny=options.tiny)}
        results: dict[str, Result] = {}
        for name in options.sections:
            results[name] = run_section(self.sections[name], bench)
            text = self.to_markdown(setting, results)
            if options.out is not None:  # after every section, in case the next one is cut off
                rows = {name: asdict(result) for name, result in results.items()}
                written = json.dumps({**setting, "sections": rows}, indent=2)
                options.out.write_text(written + "\n")
            if options.markdown is not None:
                options.markdown.write_text(text)
        sys.stdout.write(text)
        return int(any(result.failures for result in results.values()))

    def to_markdown(self, setting: Mapping[str, Any], results: Mapping[str, Result]) -> str:
        """The command, the setting and every table; what failed stands under its section."""
        versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
        driver = f", driver {setting['driver']}" if "driver" in setting else ""
        lines = [
            f"# {self.title}\n",
            f"    {setting['command']}\n",
            f"{setting['date']}, {setting['device']}{driver}; {versions}\n",
        ]
        for name, result in results.items():
            about = " ".join((self.sections[name].__doc__ or "").split())
            lines.append(f"## {name}\n\n{about} Took {result.seconds:.0f} s.\n")
            for title, rows in result.tables.items():
                lines += [f"### {title}\n", _table(rows)]
            lines += [f"**Failed:** {failure}\n" for failure in result.failures]
        return "\n".join(lines)


def run_section(section: Callable[[Bench], Result], bench: Bench) -> Result:
    """Run one section; if it crashes, that is its result."""
    began = time.perf_counter()
    try:
        result = section(bench)
    except Exception as error:  # noqa: BLE001 - the other sections must run
        result = Result(failures=[f"crashed: {type(error).__name__}: {error}"])
        sys.stderr.write(traceback.format_exc())
        release(error)
    result.seconds = time.perf_counter() - began
    return result


def environment(*, tiny: bool) -> dict[str, Any]:
    """The date, the device and the versions."""
    now = datetime.now(UTC).isoformat(timespec="minutes")
    versions = {**installed_versions(), "oomguard": oomguard.__version__}
    if tiny:
        return {"date": now, "device": "CPU, tiny models", "versions": versions}
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    return {
        "date": now,
        "device": f"{torch.cuda.get_device_name(0)}, {format_bytes(total_bytes)}",
        "driver": _driver(),
        "versions": {**versions, "CUDA": torch.version.cuda},
    }


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603 - fixed
    return answer.stdout.strip() or None


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, without the columns that hold nothing."""
    columns = [
        name
        for name in dict.fromkeys(key for row in rows for key in row)
        if any(row.get(name) is not None for row in rows)
    ]
    if not columns:
        return "none\n"
    lines = [[_heading(name) for name in columns], ["---"] * len(columns)]
    lines += [[_cell(name, row.get(name)) for name in columns] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _heading(name: str) -> str:
    for ending, unit in _UNITS.items():
        if name.endswith(ending):
            return name.removesuffix(ending).replace("_", " ") + unit
    return name.replace("_", " ")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_s") or name == "last_loss":
        return f"{value:.4f}"
    return f"{value:.2g}" if isinstance(value, float) else str(value).replace("|", "\\|")
