"""The rungs: which setting gives way, and by how much. `levers` carries them out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from oomguard.errors import ConfigurationError
from oomguard.event import half_of
from oomguard.rung import Fidelity, Rung

if TYPE_CHECKING:
    from oomguard.event import OOMEvent
    from oomguard.plan import Plan

_PAGED_8BIT = "paged_adamw_8bit"


@dataclass(frozen=True)
class CheckpointActivations(Rung):
    """Recompute activations in backward instead of storing them (gradient checkpointing)."""

    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Switch checkpointing on; spent when it is on."""
        return None if plan.gradient_checkpointing else replace(plan, gradient_checkpointing=True)

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        return "gradient_checkpointing is already on"


@dataclass(frozen=True)
class HalveSequence(Rung):
    """Halve the longest row that is trained on.

    Text and packed rows are cut into windows that overlap by half, so that every trained target is
    kept and only far context is lost; rows of completion-only losses lose their tail.

    Attributes:
        floor: Tokens below which `max_length` is not lowered.
        mode: `"windows"` or `"truncate"`; `None` chooses by the kind of loss.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.SEMANTIC
    floor: int = 256
    mode: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.floor, bool) or not isinstance(self.floor, int) or self.floor < 2:
            msg = f"HalveSequence(floor={self.floor!r}): floor must be an int of 2 or more tokens."
            raise ConfigurationError(msg)
        if self.mode not in {None, "windows", "truncate"}:
            msg = f"HalveSequence(mode={self.mode!r}): use 'windows', 'truncate' or None."
            raise ConfigurationError(msg)

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Halve `max_length`, or the width of the batch that failed where that is shorter."""
        longest = self._longest(plan, event)
        if longest is None or max(self.floor, longest // 2) >= longest:
            return None
        length = max(self.floor, longest // 2)
        rows = plan.micro_batch_size or plan.per_device_train_batch_size
        tokens = (event.tokens or rows * longest) * length // longest
        # Overlapping windows hold more tokens than the rows they were cut from: without this
        # limit their one pass would be larger than the one that failed.
        limit = min(max(tokens, length), plan.max_pass_tokens or tokens)
        return replace(
            plan,
            max_length=length,
            max_pass_tokens=max(1, limit),
            sequence_mode=self.mode or plan.sequence_mode,
        )

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        longest = self._longest(plan, event)
        if longest is None:
            return "no batch has been seen yet and max_length is not set"
        return f"rows of {longest} tokens are not above floor={self.floor}"

    @staticmethod
    def _longest(plan: Plan, event: OOMEvent) -> int | None:
        known = [length for length in (plan.max_length, event.width) if length is not None]
        return min(known, default=None)


@dataclass(frozen=True)
class SplitBatch(Rung):
    """Run each loaded batch as several smaller passes, accumulating their gradients.

    Every call halves the pass that failed, down to single rows (or documents of a packed row). The
    limit is kept in padded tokens, so that short batches stay whole.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Halve `micro_batch_size` and `max_pass_tokens`; spent at one row a pass."""
        rows = plan.micro_batch_size or plan.per_device_train_batch_size
        units = event.rows if event.rows is not None else rows
        width = event.width if event.width is not None else plan.max_length
        if units < 2 or width is None:
            return None
        tokens = event.tokens if event.tokens is not None else units * width
        half, limit, padded = half_of(units, width, tokens)
        return replace(
            plan,
            micro_batch_size=min(rows, half) if padded else -(-rows // 2),
            max_pass_tokens=min(limit, plan.max_pass_tokens or limit),
        )

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        if event.width is None and plan.max_length is None:
            return "no batch has been seen yet and max_length is not set"
        return "the pass that failed is already a single row"


@dataclass(frozen=True)
class PageOptimizer8bit(Rung):
    """Keep Adam's moments in 8 bits, in memory that is paged out to the host when it runs short.

    The live AdamW becomes bitsandbytes' paged 8-bit one; its moments are quantized, not lost.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.NUMERIC
    relieves_optimizer: ClassVar[bool] = True

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Set `optim` to `paged_adamw_8bit`; spent when it is that."""
        if plan.optim in {None, _PAGED_8BIT}:
            return None
        return replace(plan, optim=_PAGED_8BIT)

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        return f"optim is {plan.optim!r} already"


@dataclass(frozen=True)
class NarrowTargets(Rung):
    """Freeze LoRA adapters: what they learned stays, their gradients and moments go.

    Attributes:
        keep: Modules whose adapters go on training, as `LoraConfig.target_modules` names them.
        at_once: Whether to freeze all others together. Otherwise each call freezes the adapters of
            one more module, those with the most parameters first.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.SEMANTIC
    relieves_optimizer: ClassVar[bool] = True
    keep: tuple[str, ...] = ("q_proj", "v_proj")
    at_once: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.keep, str) or not self.keep:
            msg = f"NarrowTargets(keep={self.keep!r}): give a tuple of names, such as ('q_proj',)."
            raise ConfigurationError(msg)

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Drop names from `target_modules`, which has the largest first."""
        targets = plan.target_modules or ()
        others = [name for name in targets if name not in self.keep]
        if not others or len(others) == len(targets):
            return None
        dropped = others if self.at_once else others[:1]
        return replace(plan, target_modules=tuple(n for n in targets if n not in dropped))

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        if plan.target_modules is None:
            return "no LoRA adapter is trained"
        if not set(plan.target_modules) & set(self.keep):
            return f"none of keep={self.keep} has an adapter; there are {plan.target_modules}"
        return f"only adapters of keep={self.keep} are left"


@dataclass(frozen=True)
class LowerRank(Rung):
    """Halve the largest LoRA rank by truncated SVD; scaling and Adam's moments are carried over.

    Attributes:
        floor: Rank below which none is lowered.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.SEMANTIC
    relieves_optimizer: ClassVar[bool] = True
    floor: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.floor, bool) or not isinstance(self.floor, int) or self.floor < 1:
            msg = f"LowerRank(floor={self.floor!r}): floor must be a rank, an int of 1 or more."
            raise ConfigurationError(msg)

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Halve `lora_r`, down to `floor`."""
        if plan.lora_r is None or plan.lora_r <= self.floor:
            return None
        return replace(plan, lora_r=max(self.floor, plan.lora_r // 2))

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        if plan.lora_r is None:
            return "no LoRA adapter is trained"
        return f"lora_r={plan.lora_r} is not above floor={self.floor}"


@dataclass(frozen=True)
class OffloadActivations(Rung):
    """Hold what checkpointing keeps of each layer in the host's memory. In no preset."""

    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Switch offloading on; spent when it is on, or while checkpointing is off."""
        if not plan.gradient_checkpointing or plan.offload_activations:
            return None
        return replace(plan, offload_activations=True)

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        if not plan.gradient_checkpointing:
            return "gradient_checkpointing is off, so there are no checkpoints to offload"
        return "checkpoints are offloaded already"


@dataclass(frozen=True)
class ReleaseCache(Rung):
    """Try once more from an empty cache where memory is fragmented. In no preset.

    Every recovery empties the allocator's cache; this rung is for ladders in which that alone is to
    be tried before any other rung.

    Attributes:
        share: Part of the reserved memory that must be unallocated for memory to be fragmented.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    relieves_optimizer: ClassVar[bool] = True
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            msg = f"ReleaseCache(share={self.share!r}): share must be from 0 to below 1."
            raise ConfigurationError(msg)

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan | None:
        """Note the step; spent in that step, and where little is cached."""
        if plan.cache_released_step == event.step or self._unused(event) is None:
            return None
        return replace(plan, cache_released_step=event.step)

    def spent(self, plan: Plan, event: OOMEvent) -> str:
        """See `Rung.spent`."""
        if plan.cache_released_step == event.step:
            return f"the cache was released in step {event.step} already"
        return (
            f"less than {self.share:.0%} of the reserved memory is unallocated, or it is not known"
        )

    def _unused(self, event: OOMEvent) -> int | None:
        if event.reserved_bytes is None or event.allocated_bytes is None:
            return None
        unused = event.reserved_bytes - event.allocated_bytes
        enough = unused + (event.free_bytes or 0) >= (event.asked_bytes or 0)
        return unused if enough and unused > self.share * event.reserved_bytes else None
