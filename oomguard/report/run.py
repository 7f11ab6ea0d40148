"""All that a run left in its folder."""

from __future__ import annotations

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
        report: What the guard wrote.
        readings: What `VRAMReporter` wrote; empty where it did not.
        breakdowns: What the memory consisted of now and then.
        device: The device's name, where known.
        card_bytes: The card's memory, where known.
        findings: What `LeakDetector` wrote; `None` where it did not.
        unreadable: Why a file of the folder is left out.
    """

    name: str
    report: Report
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
            ConfigurationError: There is no report of a guarded run, or it is broken.
        """
        path = folder / REPORT_NAME
        if not path.is_file():
            lacks = f"has no {REPORT_NAME}" if folder.is_dir() else "is not a folder"
            msg = (
                f"{folder} {lacks}: give the output_dir of a trainer whose training oomguard.fit "
                "has ended."
            )
            raise ConfigurationError(msg)
        return cls.of(Report.load(path))

    @classmethod
    def of(cls, report: Report) -> Run:
        """The run of a report, with what lies beside the report's file, if it has one."""
        if report.folder is None:
            return cls(name="oomguard run", report=report, card_bytes=_card_in_errors(report))
        folder = report.folder
        unreadable: list[str] = []

        def beside(load: Callable[[Path], Any], name: str) -> Any:
            path = folder / name
            # A file that is older than the run is an earlier run's.
            if path.exists() and path.stat().st_mtime > report.started.timestamp() - _COARSE_S:
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


def _card_in_errors(report: Report) -> int | None:
    known = (recovery.event.total_bytes for recovery in report.recoveries)
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
