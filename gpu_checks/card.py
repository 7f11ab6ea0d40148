"""Memory that a trial runs in: a GPU whose process may be limited, or a `VirtualCard`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from oomguard.testing import VirtualCard

if TYPE_CHECKING:
    from types import TracebackType

UNLIMITED_BYTES = 2**60


class Session(Protocol):
    """One trial on a card: readings since it was entered, and limits that end with it."""

    @property
    def live_bytes(self) -> int:
        """Bytes of live tensors."""

    @property
    def ooms(self) -> int:
        """Allocations that failed so far, those that were repeated included."""

    @property
    def outside_bytes(self) -> int | None:
        """Bytes in use on the device that PyTorch has not reserved; `None` without a device."""

    def peaks(self) -> tuple[int, int | None]:
        """Most bytes allocated and reserved since the last call; starts anew."""

    def limit(self, limit_bytes: int | None) -> None:
        """Let the process have no more than `limit_bytes`; all there is if `None`."""

    def squeeze(self, spare_bytes: int = 0) -> None:
        """Let the process have no more than what is live now and `spare_bytes`."""

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def collect(self) -> None:
        """Drop unreachable objects and unused blocks."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class GpuSession:
    """The first CUDA device; a limit makes its allocator raise real out-of-memory errors."""

    def __enter__(self) -> Self:
        torch.cuda.init()  # its counters are not there before
        self.collect()
        self._ooms = self._failed()
        self.peaks()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.limit(None)

    @property
    def live_bytes(self) -> int:
        """See `Session`."""
        return torch.cuda.memory_allocated()

    @property
    def ooms(self) -> int:
        """See `Session`."""
        return self._failed() - self._ooms

    @property
    def outside_bytes(self) -> int | None:
        """See `Session`: CUDA's context, libraries, memory that bitsandbytes pages."""
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return int(total_bytes - free_bytes - torch.cuda.memory_reserved())

    def peaks(self) -> tuple[int, int | None]:
        """See `Session`."""
        found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        return found

    def limit(self, limit_bytes: int | None) -> None:
        """See `Session`; the limit is on what PyTorch reserves, the context not counted."""
        _, total_bytes = torch.cuda.mem_get_info()
        share = 1.0 if limit_bytes is None else min(1.0, limit_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(share)

    def squeeze(self, spare_bytes: int = 0) -> None:
        """See `Session`."""
        self.synchronize()
        torch.cuda.empty_cache()
        self.limit(self.live_bytes + spare_bytes)

    def synchronize(self) -> None:
        """See `Session`."""
        torch.cuda.synchronize()

    def collect(self) -> None:
        """See `Session`."""
        gc.collect()
        torch.cuda.empty_cache()

    @staticmethod
    def _failed() -> int:
        return int(torch.cuda.memory_stats().get("num_ooms", 0))


class VirtualSession(VirtualCard):
    """A `VirtualCard` on the CPU whose capacity changes while it is in use."""

    def __init__(self) -> None:
        super().__init__(UNLIMITED_BYTES)
        self.ooms = 0

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__torch_dispatch__(*args, **kwargs)
        except torch.OutOfMemoryError:
            self.ooms += 1
            raise

    @property
    def outside_bytes(self) -> int | None:
        """See `Session`."""
        return None

    def peaks(self) -> tuple[int, int | None]:
        """See `Session`; nothing is reserved on this card."""
        found, self._peak_bytes = self._peak_bytes, self._live_bytes
        return found, None

    def limit(self, limit_bytes: int | None) -> None:
        """See `Session`."""
        self._capacity_bytes = UNLIMITED_BYTES if limit_bytes is None else limit_bytes

    def squeeze(self, spare_bytes: int = 0) -> None:
        """See `Session`."""
        self.limit(self.live_bytes + spare_bytes)

    def synchronize(self) -> None:
        """The CPU does everything at once."""

    def collect(self) -> None:
        """See `Session`."""
        gc.collect()
