"""What a guarded run started with, met, and ended with."""

from __future__ import annotations

import json
import math
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from oomguard import typed
from oomguard.errors import ConfigurationError
from oomguard.event import OOMEvent
from oomguard.jump import PassedOver
from oomguard.memory.size import format_bytes
from oomguard.plan import Plan
from oomguard.report import notebook
from oomguard.report.stored import from_json, to_json, write_whole
from oomguard.report.table import WIDE, headline, summary, table
from oomguard.rung import Fidelity

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from rich.console import ConsoleOptions, RenderResult
    from transformers.trainer_utils import TrainOutput

REPORT_NAME = "oomguard.json"
SCHEMA = "oomguard.report/1"
Status = Literal["running", "finished", "failed", "interrupted"]

_REDONE_AFTER = frozenset({"forward", "backward"})
_PACKAGES = ("oomguard", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One failure and what was done about it: a row of the report.

    Attributes:
        event: The failure.
        rung: Name of the rung that was taken. `None`: releasing memory and trying again was enough.
        fidelity: What the rung does to the result; `None` where no rung was taken.
        before: The plan that failed.
        after: The plan that the step went on with.
        seconds_lost: Work thrown away plus clean-up, in seconds.
        change: What was changed besides the plan, such as `"eval batch 8 -> 4"`.
        passed_over: Rungs before it in the ladder that were not tried, by an estimate.
    """

    event: OOMEvent
    rung: str | None
    fidelity: Fidelity | None
    before: Plan
    after: Plan
    seconds_lost: float
    change: str | None = None
    passed_over: tuple[PassedOver, ...] = ()

    def log_line(self) -> str:
        """The recovery as one line; readings that could not be taken are left out."""
        readings = {"asked": self.event.asked_bytes, "free": self.event.free_bytes}
        known = [f"{name} {format_bytes(n)}" for name, n in readings.items() if n is not None]
        sizes = f" ({', '.join(known)})" if known else ""
        if self.rung is None:
            action = f"{self.change or 'released memory and tried again'}, plan unchanged"
        else:
            fidelity = f" ({self.fidelity.value})" if self.fidelity is not None else ""
            action = f"{self.rung}{fidelity}, {self.before.describe_change(self.after)}"
            action += f", {self.jump()}" if self.passed_over else ""
        step = f"step {self.event.step}"
        outcome = "redone" if self.event.phase in _REDONE_AFTER else "continued"
        return (
            f"{step}: out of memory in {self.event.phase}{sizes}: {action}; "
            f"{step} {outcome}, {self.seconds_lost:.1f} s lost"
        )

    def jump(self) -> str:
        """The rungs that were passed over, in words; empty without any."""
        rungs = ", ".join(map(str, self.passed_over))
        return f"passed over {rungs}" if rungs else ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recovery:
        """The recovery of which `values` are the fields, as `Report.save` writes them."""
        fidelity = values["fidelity"]
        return cls(
            event=OOMEvent(**values["event"]),
            rung=values["rung"],
            fidelity=None if fidelity is None else Fidelity(fidelity),
            before=Plan.from_dict(values["before"]),
            after=Plan.from_dict(values["after"]),
            seconds_lost=values["seconds_lost"],
            change=values.get("change"),  # not in files of earlier versions
            passed_over=tuple(map(PassedOver.from_dict, values.get("passed_over", ()))),
        )


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on, where installed."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


@dataclass
class Report:
    """What a guarded run started with, met, and ended with. `rich` prints it as a table.

    Attributes:
        initial_plan: The plan that the run started with.
        plan: The plan in force now.
        ladder: Names of the rungs, in order.
        recoveries: Every failure that was overcome, in order.
        train_output: What `trainer.train()` returned; `None` before it has.
        status: `"running"`, `"finished"`, `"failed"` or `"interrupted"`.
        error: What ended a failed run.
        versions: Of Python and the packages in use.
        started: When the run started.
        seconds: How long it has run.
        estimate: What was predicted before the run, as JSON types; `None` where nothing was.
        folder: Where its file is, and those of the run's callbacks beside it.
    """

    initial_plan: Plan
    plan: Plan
    ladder: tuple[str, ...]
    recoveries: list[Recovery] = field(default_factory=list)
    train_output: TrainOutput | None = None
    status: Status = "running"
    error: str | None = None
    versions: dict[str, str] = field(default_factory=installed_versions)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float = 0.0
    estimate: dict[str, Any] | None = None
    folder: Path | None = field(default=None, init=False, repr=False, compare=False)
    _shown_in: int | None = field(default=None, init=False, repr=False, compare=False)  # cell

    @property
    def seconds_lost(self) -> float:
        """Work thrown away plus clean-up of all recoveries, in seconds."""
        return math.fsum(recovery.seconds_lost for recovery in self.recoveries)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table of the recoveries, or one line where there were none."""
        yield Text(headline(self), style="bold")
        if self.recoveries:
            yield from ("", table(self, wide=options.max_width >= WIDE), "", Text(summary(self)))
        from oomguard.report.memory import memory_text
        from oomguard.report.run import Run

        yield from memory_text(Run.of(self), options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; a reader sees the old file or the new one, never half of one.

        Raises:
            OSError: The file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, default=str)
        write_whole(path, text + "\n")
        self.folder = Path(path).parent

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """The report that `save` wrote.

        Raises:
            ConfigurationError: The file is missing, broken, or of another schema.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, RecursionError, ValueError) as error:
            msg = f"{path}: cannot be read as JSON of schema {SCHEMA!r} ({error})."
            raise ConfigurationError(msg) from error
        found = values.get("schema") if isinstance(values, dict) else None
        if found != SCHEMA:
            msg = (
                f"{path}: expected schema {SCHEMA!r}, found {found!r}. Give the file that "
                "Report.save wrote, or load it with the oomguard version that wrote it."
            )
            raise ConfigurationError(msg)
        try:
            report = cls._from_dict(values)
            typed.check(report, {"TrainOutput": tuple})
            report.started.timestamp()  # years may be beyond
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            msg = (
                f"{path}: schema {SCHEMA!r}, but its content is not a report's "
                f"({type(error).__name__}: {error}). Give a file as Report.save wrote it."
            )
            raise ConfigurationError(msg) from error
        report.folder = Path(path).parent
        return report

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML file that needs no network; written to `path` if it is given.

        What `VRAMReporter` and `LeakDetector` wrote is looked for where the report was saved or
        loaded.

        Raises:
            ConfigurationError: There is a timeline to draw, and Plotly is missing.
            OSError: The file cannot be written.
        """
        from oomguard.report.page import page
        from oomguard.report.run import Run

        text = page(Run.of(self))
        if path is not None:
            write_whole(path, text)
        return text

    def show(self) -> None:
        """Print the table in a terminal, or show it below a notebook's cell; else nothing."""
        console = Console()
        if console.is_jupyter:
            notebook.display(self._repr_html_())
            self._shown_in = notebook.cell()
        elif console.is_terminal:
            console.print(self)

    def _ipython_display_(self) -> None:
        """As the last line of the cell that it was shown in, it is not shown again."""
        if self._shown_in is None or self._shown_in != notebook.cell():
            notebook.display(self._repr_html_())

    def _repr_html_(self) -> str:
        """What a notebook shows: the recoveries as a table, and the memory as a line."""
        from oomguard.report.page import for_notebook
        from oomguard.report.run import Run

        return for_notebook(self, Run.of(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as `save` writes it; what is left of other types is for `json`'s `default`."""
        output = None if self.train_output is None else to_json(self.train_output._asdict())
        started = self.started.isoformat()
        values = {"schema": SCHEMA, **asdict(self), "train_output": output, "started": started}
        del values["folder"], values["_shown_in"]  # of this object, not of the run
        return values

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> Report:
        return cls(
            initial_plan=Plan.from_dict(values["initial_plan"]),
            plan=Plan.from_dict(values["plan"]),
            ladder=tuple(values["ladder"]),
            recoveries=[Recovery.from_dict(recovery) for recovery in values["recoveries"]],
            train_output=_train_output(values["train_output"]),
            status=values["status"],
            error=values["error"],
            versions=dict(values["versions"]),
            started=datetime.fromisoformat(values["started"]),
            seconds=values["seconds"],
            estimate=values.get("estimate"),  # not in files of earlier versions
        )


def _train_output(values: dict[str, Any] | None) -> TrainOutput | None:
    if values is None:
        return None
    # Slow to import, and a report of a run that never finished does not need it.
    from transformers.trainer_utils import TrainOutput

    output = TrainOutput(**from_json(values))
    loss = output.training_loss  # one that is not finite is a loss too
    if not (typed.fits(output.global_step, int) and (typed.fits(loss, int) or type(loss) is float)):
        msg = f"train_output is {output}, without a step or a loss"
        raise TypeError(msg)
    return output
