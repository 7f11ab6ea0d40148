"""What fails in a watcher stays there: one warning, then silence."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

logger = logging.getLogger("oomguard.watch")


class Quiet:
    """Ends every `Exception` raised in its `with` blocks; the first one is told as a warning.

    Enter it as often as is needed, one inside the other too.

    Args:
        consequence: What does not happen then, such as `"memory is not read"`.
    """

    def __init__(self, consequence: str) -> None:
        self._consequence = consequence
        self._told = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Keep an `Exception`; what ends the process goes on."""
        if error is None or not isinstance(error, Exception):
            return False
        if not self._told:
            self._told = True
            logger.warning(
                "%s: %s: %s. Training goes on; this is said once.",
                self._consequence,
                type(error).__name__,
                str(error),  # the error itself would keep its frames, and all they hold
            )
        return True
