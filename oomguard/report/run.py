"""All that a run left in its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from oomguard.errors import ConfigurationError
from oomguard.report.record import REPORT_NAME, Report
from oomguard.watch import findings as found
from oomguard.watch import series as watched
from oomguard.watch.findings import load_findings
from oomguard.watch.series import Series

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from oomguard.report.record import Recovery
    from oomguard.watch.findings import Finding
    from oomguard.watch.readings import Reading
    from oomguard.watch.series import Breakdown

_COARSE_S = 2.0  # file systems round the time of a file down, FAT to two seconds
_FROM_THE_DEVICE = ("allocated_bytes", "peak_allocated_bytes", "peak_reserved_bytes")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as it is shown.

    Attributes:
        name: What it is called: the name of its folder.
        report: What the guard wrote; `None` for a run that was watched only.
        readings: What `VRAMReporter` wrote; empty where it did not.
        breakdowns: What the memory consisted of now and then.
        device: The device's name, where known.
        card_bytes: The card's memory, where known.
        findings: What `LeakDetector` wrote; `None` where it did not.
        unreadable: Why a file of the folder is left out.
    """

    name: str
    report: Report | None
    readings: tuple[Reading, ...] = ()
    breakdowns: tuple[Breakdown, ...] = ()
    device: str | None = None
    card_bytes: int | None = None
    findings: tuple[Finding, ...] | None = None
    unreadable: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The run whose `output_dir` was `folder`.

        Raises:
            ConfigurationError: Nothing of a run is there, or what is there is broken.
        """
        path = folder / REPORT_NAME
        if path.is_file():
            return cls.of(Report.load(path))
        run = cls._in(folder, None)
        if not run.readings and run.findings is None:
            lacks = f"has no {REPORT_NAME}" if folder.is_dir() else "is not a folder"
            msg = (
                f"{folder} {lacks}: give the output_dir of a trainer whose training oomguard.fit "
                "has ended, or VRAMReporter has watched."
            )
            raise ConfigurationError(" ".join([*run.unreadable, msg]))
        return run

    @classmethod
    def of(cls, report: Report) -> Run:
        """The run of a report, with what lies beside the report's file, if it has one."""
        if report.folder is None:
            return cls(name="oomguard run", report=report, card_bytes=_card_in_errors(report))
        return cls._in(report.folder, report)

    @classmethod
    def _in(cls, folder: Path, report: Report | None) -> Run:
        unreadable: list[str] = []
        # A file that is older than the run is an earlier run's.
        since = -math.inf if report is None else report.started.timestamp() - _COARSE_S

        def beside(load: Callable[[Path], Any], name: str) -> Any:
            path = folder / name
            if path.exists() and path.stat().st_mtime > since:
                return _unless_broken(load, path, unreadable)
            return None

        series = beside(Series.load, watched.FILE_NAME)
        findings = beside(load_findings, found.FILE_NAME)
        return cls(
            name=folder.resolve().name,
            report=report,
            readings=() if series is None else tuple(series.readings),
            breakdowns=() if series is None else tuple(series.breakdowns),
            device=None if series is None else series.device,
            card_bytes=(series and series.card_total_bytes) or _card_in_errors(report),
            findings=None if findings is None else tuple(findings),
            unreadable=tuple(unreadable),
        )

    @property
    def recoveries(self) -> list[Recovery]:
        """Every failure that was overcome."""
        return [] if self.report is None else self.report.recoveries

    def column(self, name: str) -> list[Any]:
        """One field of all readings, in order."""
        return [getattr(reading, name) for reading in self.readings]

    @property
    def most_bytes(self) -> int | None:
        """The most that is known to have been in use: of the device, else of the host."""
        known = (self.largest(name) for name in _FROM_THE_DEVICE)
        of_device = max((size for size in known if size is not None), default=None)
        return self.largest("host_rss_bytes") if of_device is None else of_device

    def largest(self, name: str) -> int | None:
        """The largest known value of a field."""
        return max((size for size in self.column(name) if size is not None), default=None)


def _card_in_errors(report: Report | None) -> int | None:
    recoveries = [] if report is None else report.recoveries
    known = (recovery.event.total_bytes for recovery in recoveries)
    return next((size for size in known if size is not None), None)


def _unless_broken(load: Callable[[Path], Any], path: Path, unreadable: list[str]) -> Any:
    """What a file holds; one that is broken costs its part of the picture and no more."""
    try:
        return load(path)
    except ConfigurationError as error:
        unreadable.append(str(error))
    except Exception as error:  # noqa: BLE001 - a report is shown while training ends, or fails
        unreadable.append(f"{path}: cannot be read ({type(error).__name__}: {error}).")
    return None
