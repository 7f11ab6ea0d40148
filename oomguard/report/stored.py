"""Files that are whole or absent, and values as JSON types."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

_NOT_FINITE = ("nan", "inf", "-inf")


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file; a reader sees the old one or the new one, never half of one.

    Args:
        path: The file; folders that are missing are made.
        content: Bytes, or text that is written in UTF-8.

    Raises:
        OSError: The file cannot be written; the old one stays.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory: a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> Any:
    """Metrics as JSON types: NumPy and torch scalars as numbers, nan and infinity as text."""
    if isinstance(value, dict):
        return {name: to_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """What `to_json` was given, with Python's own numbers."""
    if isinstance(value, dict):
        return {name: from_json(entry) for name, entry in value.items()}
    return float(value) if value in _NOT_FINITE else value
