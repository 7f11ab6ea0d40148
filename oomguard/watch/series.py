"""The readings of a run: bounded however long it is, and its file."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any

from oomguard.errors import ConfigurationError
from oomguard.watch.readings import Phase, Reading

FILE_NAME = "oomguard_vram.parquet"

_MAX_ROWS: dict[Phase, int] = {"train": 3072, "eval": 512, "save": 512}  # each of them even
_MAX_BREAKDOWNS = 64
_KEY = "oomguard."
_TEXT, _FLOAT = {"phase"}, {"time_s"}  # the other columns are whole numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """What the allocated bytes consisted of just after an optimizer step.

    Attributes:
        step: The optimizer step.
        weights_bytes: Parameters and buffers of the model.
        gradients_bytes: Their gradients.
        optimizer_bytes: The optimizer's state.
        other_bytes: What else was allocated; `None` where that is not known.
    """

    step: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    other_bytes: int | None


class Series:
    """The readings of a run; where they grow too many, neighbours of one phase are merged.

    A merged reading is the later one with the higher peaks, so no peak is ever lost. The rows of
    one phase never exceed 3,072 (`"train"`) or 512 (the others), and stand for equally many
    readings each, but for those that `load` brought.

    Attributes:
        device: The device's name.
        card_total_bytes: Its memory; `None` without one.
    """

    def __init__(self, device: str = "cpu", card_total_bytes: int | None = None) -> None:
        self.device = device
        self.card_total_bytes = card_total_bytes
        self._phases = {phase: _Thinned(rows) for phase, rows in _MAX_ROWS.items()}
        self._breakdowns: list[Breakdown] = []

    def add(self, reading: Reading) -> None:
        """Take one reading in; those of a phase come in order of time."""
        self._phases[reading.phase].add(reading)

    def add_breakdown(self, breakdown: Breakdown) -> None:
        """Take one breakdown in; the latest 64 are kept."""
        self._breakdowns = [*self._breakdowns, breakdown][-_MAX_BREAKDOWNS:]

    @property
    def readings(self) -> list[Reading]:
        """What is kept, in order of time."""
        kept = [row for thinned in self._phases.values() for row in thinned.rows]
        return sorted(kept, key=attrgetter("time_s"))

    @property
    def breakdowns(self) -> list[Breakdown]:
        """What is kept, in the order in which it came."""
        return list(self._breakdowns)

    @property
    def time_s(self) -> float:
        """When the latest reading was taken; 0 before the first."""
        latest = (thinned.rows[-1].time_s for thinned in self._phases.values() if thinned.rows)
        return max(latest, default=0.0)

    def go_on(self, earlier: Series, step: int) -> None:
        """Put before the first reading what an earlier run had read up to `step`."""
        for phase, thinned in earlier._phases.items():
            self._phases[phase].rows = [row for row in thinned.rows if row.step <= step]
        self._breakdowns = [entry for entry in earlier.breakdowns if entry.step <= step]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: beside its place first, so that there is a whole one at any time.

        Raises:
            OSError: It cannot be written; what was there before stays.
        """
        import pyarrow as pa
        from pyarrow import parquet

        readings, path = self.readings, Path(path)
        columns = {field.name: [getattr(row, field.name) for row in readings] for field in _FIELDS}
        table = pa.table(columns, schema=_layout(pa).with_metadata(self._metadata()))
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                parquet.write_table(table, file, use_dictionary=False)  # five times as fast
            beside.replace(path)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def _metadata(self) -> dict[str, str]:
        values: dict[str, Any] = {
            "card_total_bytes": self.card_total_bytes,
            "device": self.device,
            "breakdowns": [asdict(entry) for entry in self._breakdowns],
        }
        return {_KEY + name: json.dumps(value) for name, value in values.items()}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Series:
        """The series that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ConfigurationError: It is another kind of file, or was not written to its end.
        """
        import pyarrow as pa
        from pyarrow import parquet

        try:
            table = parquet.ParquetFile(Path(path)).read()
            told = {key.decode(): value for key, value in (table.schema.metadata or {}).items()}
            read = {name: json.loads(told[_KEY + name]) for name in _TOLD}
            series = cls(read["device"], read["card_total_bytes"])
            for row in table.cast(_layout(pa)).to_pylist():
                series._phases[row["phase"]].rows.append(Reading(**row))
            series._breakdowns = [Breakdown(**entry) for entry in read["breakdowns"]]
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            msg = (
                f"{path}: not a series of memory readings that this version of oomguard reads "
                f"({type(error).__name__}: {error}). Let the run write it anew."
            )
            raise ConfigurationError(msg) from error
        return series


_FIELDS = fields(Reading)
_TOLD = ("card_total_bytes", "device", "breakdowns")


def _layout(pa: Any) -> Any:
    def kind(name: str) -> Any:
        return pa.string() if name in _TEXT else pa.float64() if name in _FLOAT else pa.int64()

    return pa.schema([pa.field(field.name, kind(field.name)) for field in _FIELDS])


class _Thinned:
    """Rows that stand for equally many readings each; twice as many once there is no more room."""

    def __init__(self, max_rows: int) -> None:
        self.rows: list[Reading] = []
        self._max_rows = max_rows
        self._per_row = 1
        self._in_last = 1

    def add(self, reading: Reading) -> None:
        if self.rows and self._in_last < self._per_row:
            self.rows[-1] = merged(self.rows[-1], reading)
            self._in_last += 1
            return
        while len(self.rows) >= self._max_rows:
            pairs = zip_longest(self.rows[::2], self.rows[1::2])
            self.rows = [merged(one, other) if other else one for one, other in pairs]
            self._per_row *= 2
        self.rows.append(reading)
        self._in_last = 1


def merged(earlier: Reading, later: Reading) -> Reading:
    """One reading in the place of two: the later one, with the higher of their peaks."""
    allocated = _highest(earlier.peak_allocated_bytes, later.peak_allocated_bytes)
    reserved = _highest(earlier.peak_reserved_bytes, later.peak_reserved_bytes)
    if (allocated, reserved) == (later.peak_allocated_bytes, later.peak_reserved_bytes):
        return later
    return replace(later, peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)


def _highest(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)
