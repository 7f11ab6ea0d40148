"""Sizes as text: "1.5 GiB" to bytes and back."""

from __future__ import annotations

import re
from fractions import Fraction

from oomguard.errors import ConfigurationError

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30
_UNITS = {
    "": 1,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kib": _KIB,
    "mib": _MIB,
    "gib": _GIB,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
# Twenty digits hold any size there is, and keep a mistyped text from becoming a huge integer.
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(size: str | int) -> int:
    """Bytes of a size.

    Args:
        size: A whole number of bytes, or text such as `"2GiB"`, `"512 MiB"`, `"1.5 GiB"`,
            `"100 bytes"`. KiB, MiB, GiB and TiB are powers of 1024; KB, MB, GB and TB are powers
            of 1000 (IEC 80000-13). Case and spaces do not matter; a number alone is in bytes.

    Returns:
        The size, 0 or more; parts of a byte are cut off.

    Raises:
        ConfigurationError: It is negative, or not a size. It is a `ValueError` too.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    factor = _UNITS.get(found[2].lower()) if found else None
    if found is None or factor is None:
        msg = (
            f"{size!r} is not a size: give (a) a whole number of bytes, such as {2 * _GIB}, or "
            "(b) text with a unit, such as '2GiB', '1.5 GiB' or '512MiB'"
        )
        raise ConfigurationError(msg)
    return int(Fraction(found[1]) * factor)


def format_bytes(size_bytes: int) -> str:
    """A size as PyTorch's memory messages print it: `"2.00 GiB"`, `"512.00 MiB"`, `"100 bytes"`.

    A unit starts above, not at, its own size, as in PyTorch's `c10::CachingAllocator::format_size`:
    1 GiB is `"1024.00 MiB"`.
    """
    if size_bytes <= _KIB:
        return f"{size_bytes} bytes"
    if size_bytes <= _MIB:
        return f"{size_bytes / _KIB:.2f} KiB"
    if size_bytes <= _GIB:
        return f"{size_bytes / _MIB:.2f} MiB"
    return f"{size_bytes / _GIB:.2f} GiB"
