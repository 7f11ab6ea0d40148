"""What a card takes for itself, and which kernels run on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from oomguard.errors import ConfigurationError
from oomguard.memory.size import format_bytes, parse_bytes

_MIB, _GIB = 2**20, 2**30
# Measured on an H100 right after the first allocation; smaller chips have smaller contexts.
_CONTEXT_BYTES = 648_871_936
# By how much an H100's context grew while a process loaded its kernels in training, in bfloat16 as
# on a base in 4 bits: `python -m gpu_checks.find`.
_KERNELS_BYTES = 148 * _MIB
# getChosenWorkspaceSize of ATen/cuda/CUDABlas: 4096 KiB x 8 on Hopper and later, and
# 4096 KiB x 2 + 16 KiB x 8 before.
_WORKSPACE_BYTES = {True: 32 * _MIB, False: 8_519_680}


@dataclass(frozen=True)
class Card:
    """Constants of one kind of card.

    Attributes:
        name: As the driver gives it, or the size where only that is known.
        total_bytes: Its memory; `None` where nothing is known.
        context_bytes: What the driver and CUDA's context take before the first tensor.
        workspace_bytes: cuBLAS' workspace per handle; a training process has two handles, one of
            the main thread and one of autograd's.
        capability: Compute capability; `None` where unknown.
        multiprocessors: Streaming multiprocessors, by which bitsandbytes chooses kernels.
        context_measured: Whether `context_bytes` was measured on this kind of card.
        is_host: Whether it is no card but the host's memory.
    """

    name: str
    total_bytes: int | None
    capability: tuple[int, int] | None = None
    multiprocessors: int | None = None
    context_bytes: int = _CONTEXT_BYTES
    context_measured: bool = False
    is_host: bool = False

    @property
    def workspace_bytes(self) -> int:
        """Bytes of one cuBLAS handle; Hopper's, the larger, where the capability is unknown."""
        if self.is_host:
            return 0
        return _WORKSPACE_BYTES[self.capability is None or self.capability >= (9, 0)]

    @property
    def known(self) -> bool:
        """Whether the kernels that run on it are known."""
        return self.capability is not None

    @property
    def outside_bytes(self) -> int:
        """What a training takes beside PyTorch's allocator: CUDA's context with its kernels."""
        return 0 if self.is_host else self.context_bytes + _KERNELS_BYTES

    @property
    def usable_bytes(self) -> int | None:
        """What PyTorch's allocator can have of an otherwise idle card."""
        return None if self.total_bytes is None else max(0, self.total_bytes - self.outside_bytes)

    @classmethod
    def measured(cls, name: str, total_bytes: int, context_bytes: int | None = None) -> Card:
        """A card that is there: what was measured, and for the rest what the table has.

        Args:
            name: As the driver gives it.
            total_bytes: Its memory.
            context_bytes: What the process has of it beside PyTorch's allocator; `None` where the
                driver does not tell.
        """
        try:
            known = cls.of(name)
        except ConfigurationError:  # a kind of card that the table does not have
            known = cls.of(total_bytes)
        known = replace(known, name=name, total_bytes=total_bytes)
        if context_bytes is None:
            return known
        return replace(known, context_bytes=context_bytes, context_measured=True)

    @classmethod
    def of(cls, card: Card | str | int | None) -> Card:
        """The constants of a card given by name (`"H100"`), by size (`"12GiB"`, bytes) or not.

        `"host"` is the host's memory, for training on the CPU.

        Raises:
            ConfigurationError: It is neither a card of the table nor a size.
        """
        if isinstance(card, Card):
            return card
        if card is None:
            return UNKNOWN
        if card == HOST.name:
            return HOST
        found = _by_name(card) if isinstance(card, str) else None
        if found is not None:
            return found
        try:
            total_bytes = parse_bytes(card)
        except ConfigurationError as error:
            names = ", ".join(one.name for one in CARDS)
            msg = f"card={card!r} is neither a size such as '12GiB' nor one of {names}"
            raise ConfigurationError(msg) from error
        if total_bytes == 0:
            msg = f"card={card!r}: a card needs memory, such as '12GiB'"
            raise ConfigurationError(msg)
        return replace(UNKNOWN, name=f"{format_bytes(total_bytes)} card", total_bytes=total_bytes)


def _gib(size: float) -> int:
    return int(size * _GIB)


def _by_name(name: str) -> Card | None:
    words = set(name.lower().replace("-", " ").replace("nvidia", "").split())
    if not words:
        return None
    return next((card for card in CARDS if words <= set(card.name.lower().split())), None)


UNKNOWN = Card("unknown card", None)
# A training on the CPU, as `oomguard.testing.VirtualCard` measures it.
HOST = Card("host", None, context_bytes=0, is_host=True)
# Multiprocessors and capabilities: NVIDIA's data sheets and the CUDA programming guide. Memory: the
# "total capacity" that PyTorch's out-of-memory messages of public reports give, the lowest where
# they differ (ECC and displays take their part); measured for the H100. Cards whose context has not
# been measured get the H100's.
CARDS = (
    Card("H100 80GB HBM3", 85_017_493_504, (9, 0), 132, context_measured=True),
    Card("H100 PCIe", _gib(79.1), (9, 0), 114),
    Card("H200", _gib(139.8), (9, 0), 132),
    Card("A100 80GB", _gib(79.1), (8, 0), 108),
    Card("A100 40GB", _gib(39.3), (8, 0), 108),
    Card("A10G", _gib(22.0), (8, 6), 80),
    Card("A10", _gib(22.0), (8, 6), 72),
    Card("A40", _gib(44.3), (8, 6), 84),
    Card("RTX A6000", _gib(47.5), (8, 6), 84),
    Card("L4", _gib(22.0), (8, 9), 58),
    Card("L40S", _gib(44.3), (8, 9), 142),
    Card("T4", _gib(14.5), (7, 5), 40),
    Card("V100 16GB", _gib(15.7), (7, 0), 80),
    Card("V100 32GB", _gib(31.7), (7, 0), 80),
    Card("RTX 3060", _gib(11.7), (8, 6), 28),
    Card("RTX 3080", _gib(9.7), (8, 6), 68),
    Card("RTX 3090", _gib(23.6), (8, 6), 82),
    Card("RTX 4060 Ti", _gib(15.6), (8, 9), 34),
    Card("RTX 4070", _gib(11.7), (8, 9), 46),
    Card("RTX 4080", _gib(15.6), (8, 9), 76),
    Card("RTX 4090", _gib(23.6), (8, 9), 128),
    Card("RTX 5090", _gib(31.3), (12, 0), 170),
)
