"""What was found wrong with a run's memory, and its file."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from oomguard import typed
from oomguard.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FILE_NAME = "oomguard_findings.json"

Kind = Literal["leak", "cycles", "fragmentation", "outside", "neighbour", "thrashing", "spilling"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause of trouble with memory. What is not known is `None`.

    Attributes:
        kind: `"leak"`: tensors that nothing lets go of. `"cycles"`: objects that refer to each
            other and wait for the garbage collector. `"fragmentation"`: memory that PyTorch has
            reserved in pieces too small to use. `"outside"`: memory of this process that PyTorch
            knows nothing of. `"neighbour"`: another process on the device. `"thrashing"`: the
            allocator empties its cache again and again to find room. `"spilling"`: the driver
            moves memory to the host instead of failing.
        message: All of it for a person: what, how much, since when, who, what to do.
        step: The optimizer step at which it was found.
        bytes_per_step: How fast it grows.
        since_step: The step at which it began.
        bytes_so_far: By how much it has grown since.
        phase: In which phase it grows: `"train"`, `"eval"`, `"save"`, `"recovery"`, or
            `"training"` where each training of a process leaves something behind.
        full_at_step: Between which steps the card is full if it goes on like this.
        holder: What holds the memory, such as `"MyCallback.outputs > list[84 of 114]"`.
        stacks: Where it was allocated, the most first, if allocations were recorded.
        advice: What to change.
        withdrawn: Whether it is taken back, because the growth has stopped.
    """

    kind: Kind
    message: str
    step: int | None = None
    bytes_per_step: float | None = None
    since_step: int | None = None
    bytes_so_far: int | None = None
    phase: str | None = None
    full_at_step: tuple[int, int] | None = None
    holder: str | None = None
    stacks: tuple[str, ...] = ()
    advice: str | None = None
    withdrawn: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Finding:
        """The finding of which `values` are the fields; those that are unknown are left out.

        Raises:
            TypeError: A field without a default is missing, or one is of another type.
            ValueError: It is of no kind that there is.
        """
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        if known.get("kind") not in get_args(Kind):
            msg = f"kind is {known.get('kind')!r}, not one of {get_args(Kind)}"
            raise ValueError(msg)
        for name in ("full_at_step", "stacks"):
            if known.get(name) is not None:
                known[name] = tuple(known[name])
        finding = cls(**known)
        typed.check(finding)
        return finding


def save_findings(findings: Sequence[Finding], path: str | os.PathLike[str]) -> None:
    """Write the file: beside its place first, so that there is a whole one at any time.

    Raises:
        OSError: It cannot be written; what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps([entry.to_dict() for entry in findings], indent=2) + "\n")
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def load_findings(path: str | os.PathLike[str]) -> list[Finding]:
    """The findings that `save_findings` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigurationError: It is another kind of file.
    """
    try:
        return [Finding.from_dict(values) for values in json.loads(Path(path).read_text("utf-8"))]
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        msg = (
            f"{path}: not a list of findings that this version of oomguard reads "
            f"({type(error).__name__}: {error}). Let the run write it anew."
        )
        raise ConfigurationError(msg) from error
