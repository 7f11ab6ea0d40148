"""What happened to a guarded run: for the log, for the terminal, and as a JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich import box
from rich.table import Column, Table
from rich.text import Text

from oomguard.errors import ConfigurationError
from oomguard.event import OOMEvent
from oomguard.jump import PassedOver
from oomguard.memory.size import format_bytes
from oomguard.plan import Plan
from oomguard.rung import Fidelity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console, ConsoleOptions, RenderResult
    from transformers.trainer_utils import TrainOutput

SCHEMA = "oomguard.report/1"
Status = Literal["running", "finished", "failed", "interrupted"]

_REDONE_AFTER = frozenset({"forward", "backward"})
_WIDE = 112
_UNKNOWN = "-"
_NOT_FINITE = ("nan", "inf", "-inf")
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

    @property
    def seconds_lost(self) -> float:
        """Work thrown away plus clean-up of all recoveries, in seconds."""
        return math.fsum(recovery.seconds_lost for recovery in self.recoveries)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table of the recoveries, or one line where there were none."""
        yield Text(self._headline(), style="bold")
        if self.recoveries:
            yield from ("", self._table(wide=options.max_width >= _WIDE), "", Text(self._summary()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; a reader sees the old file or the new one, never half of one.

        Raises:
            OSError: The file cannot be written.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._to_dict(), indent=2, allow_nan=False, default=str)
        # In the same directory: a rename is atomic only within one file system.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """The report that `save` wrote.

        Raises:
            ConfigurationError: The file is missing, broken, or of another schema.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
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
            return cls._from_dict(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = (
                f"{path}: schema {SCHEMA!r}, but its content is not a report's "
                f"({type(error).__name__}: {error}). Give a file as Report.save wrote it."
            )
            raise ConfigurationError(msg) from error

    def _headline(self) -> str:
        if not self.recoveries:
            failure = f"failed without a recovery: {self.error or 'no error was recorded'}"
            happened = failure if self.status == "failed" else "no out-of-memory error"
            change = _settings(self.initial_plan, self.plan) or "nothing was changed"
            return f"oomguard: {happened}; {change}"
        count = len(self.recoveries)
        before, after = self.initial_plan.effective_batch_size, self.plan.effective_batch_size
        batch = f"{after} unchanged" if before == after else f"changed from {before} to {after}"
        return f"oomguard: {count} recover{'y' if count == 1 else 'ies'}, effective batch {batch}"

    def _table(self, *, wide: bool) -> Table:
        table = Table(
            *(Column(name, no_wrap=True) for name in _pair("step", "phase", wide)),
            *(Column(name, no_wrap=True, justify="right") for name in _pair("asked", "free", wide)),
            *(Column(name, overflow="fold") for name in _pair("rung", "fidelity", wide)),
            Column("change", overflow="fold"),
            Column("lost", no_wrap=True, justify="right"),
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            leading=0 if wide else 1,
        )
        for recovery in self.recoveries:
            table.add_row(*map(Text, _cells(recovery, wide)))
        return table

    def _summary(self) -> str:
        endings = {
            "failed": f"failed: {self.error or 'no error was recorded'}",
            "interrupted": "interrupted before the end",
        }
        steps = "" if self.status == "failed" else ", 0 steps"
        change = _settings(self.initial_plan, self.plan) or "as at the start"
        lines = [f"lost: {self.seconds_lost:.1f} s{steps}", f"plan: {change}"]
        return "\n".join([*lines, *filter(None, [endings.get(self.status)])])

    def _to_dict(self) -> dict[str, Any]:
        output = None if self.train_output is None else _to_json(self.train_output._asdict())
        started = self.started.isoformat()
        return {"schema": SCHEMA, **asdict(self), "train_output": output, "started": started}

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> Report:
        status = values["status"]
        if status not in get_args(Status):
            msg = f"status is {status!r}, not one of {get_args(Status)}"
            raise ValueError(msg)
        return cls(
            initial_plan=Plan.from_dict(values["initial_plan"]),
            plan=Plan.from_dict(values["plan"]),
            ladder=tuple(values["ladder"]),
            recoveries=[Recovery.from_dict(recovery) for recovery in values["recoveries"]],
            train_output=_train_output(values["train_output"]),
            status=status,
            error=values["error"],
            versions=dict(values["versions"]),
            started=datetime.fromisoformat(values["started"]),
            seconds=values["seconds"],
            estimate=values.get("estimate"),  # not in files of earlier versions
        )


def _settings(before: Plan, after: Plan) -> str:
    """The change without the words on the effective batch, which the headline has."""
    batch = after.describe_change(after)
    return before.describe_change(after).removesuffix(batch).removesuffix(", ")


def _pair(first: str, second: str, wide: bool) -> tuple[str, ...]:
    """Two cells, or one of two lines where columns are few."""
    return (first, second) if wide else (f"{first}\n{second}",)


def _cells(recovery: Recovery, wide: bool) -> tuple[str, ...]:
    event = recovery.event
    asked, free = (
        _UNKNOWN if size is None else format_bytes(size)
        for size in (event.asked_bytes, event.free_bytes)
    )
    fidelity = _UNKNOWN if recovery.fidelity is None else recovery.fidelity.value
    return (
        *_pair(str(event.step), event.phase, wide),
        *_pair(asked, free, wide),
        *_pair(
            recovery.rung or (_UNKNOWN if recovery.change else "released memory"), fidelity, wide
        ),
        "\n".join(filter(None, (_changed(recovery), recovery.jump()))),
        f"{recovery.seconds_lost:.1f} s",
    )


def _changed(recovery: Recovery) -> str:
    return recovery.change or _settings(recovery.before, recovery.after) or "plan unchanged"


def _to_json(value: Any) -> Any:
    """Metrics as JSON types: NumPy and torch scalars as numbers, nan and infinity as text."""
    if isinstance(value, dict):
        return {name: _to_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(entry) for entry in value]
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_json(entry) for name, entry in value.items()}
    return float(value) if value in _NOT_FINITE else value


def _train_output(values: dict[str, Any] | None) -> TrainOutput | None:
    if values is None:
        return None
    # Slow to import, and a report of a run that never finished does not need it.
    from transformers.trainer_utils import TrainOutput

    return TrainOutput(**_from_json(values))
