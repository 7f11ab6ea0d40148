"""Real out-of-memory errors on one NVIDIA GPU, and what recovering from them costs.

    python -m gpu_checks.recover --out recover.json --markdown recover.md

measures on a GPU of about 40 GB or more; with `--tiny` the same code trains tiny models on the CPU.
Exits with 1 if a section crashed or found something that must not be.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gpu_checks.report import Check
from gpu_checks.sections import SECTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen sections; returns the exit code."""
    about = (__doc__ or "").partition("\n")[0]
    return Check("gpu_checks.recover", "Recovery, measured", about, SECTIONS).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
