"""Over rungs that cannot suffice: which of the next ones to take, by what each would need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from oomguard.memory.size import format_bytes
from oomguard.plan import Plan
from oomguard.rung import Fidelity, RungLike, rung_fidelity, rung_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from oomguard.event import OOMEvent

_SURE = 1.03
"""A rung is passed over where it is estimated to need that much of what there is: estimates of
allocated bytes are at most 1.5 % off (docs/prediction.md), and less than them never suffices."""
_AHEAD = 2  # rungs after the next one that are looked at; each may take seconds to estimate
_DEEPEST = 16  # halvings of one rung; a plain callable may go on forever


class Candidate(NamedTuple):
    """A rung that could be taken now.

    Attributes:
        rung: The rung.
        plan: The plan after it.
        position: Its place in the ladder.
    """

    rung: RungLike
    plan: Plan
    position: int


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """A rung that was not tried, since it was estimated not to suffice.

    Attributes:
        rung: Its name.
        plan: The plan that it would have led to.
        peak_allocated_bytes: What that was estimated to need.
        usable_bytes: What there was.
    """

    rung: str
    plan: Plan
    peak_allocated_bytes: int
    usable_bytes: int

    def __str__(self) -> str:
        needed, there = format_bytes(self.peak_allocated_bytes), format_bytes(self.usable_bytes)
        return f"{self.rung} ({needed} estimated, {there} there)"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PassedOver:
        """The rung of which `values` are the fields as JSON types."""
        return cls(**{**values, "plan": Plan.from_dict(values["plan"])})


def choose(
    first: Candidate,
    later: Iterator[Candidate],
    deeper: Iterable[Candidate],
    needs: Callable[[Plan], int | None],
    usable_bytes: int,
) -> tuple[Candidate, tuple[PassedOver, ...]]:
    """The first rung that is estimated to suffice; `first` where none is, or where it may.

    A rung that changes the training more than the one that would be tried next is never jumped to.

    Args:
        first: The rung that is next in the ladder.
        later: The other rungs that could be taken now, in the ladder's order.
        deeper: The same rung as `first`, taken several times.
        needs: What a plan is estimated to need; `None` where that is not known.
        usable_bytes: What there is.

    Returns:
        The rung, and those before it that cannot suffice.
    """
    order = list(Fidelity)
    rest = tuple(islice(later, _AHEAD))
    worst = max(order.index(rung_fidelity(one.rung)) for one in (first, *rest[:1]))
    alike = (one for one in rest if order.index(rung_fidelity(one.rung)) <= worst)
    passed: list[tuple[Candidate, int]] = []
    for candidate in chain([first], alike, islice(deeper, _DEEPEST)):
        needed = needs(candidate.plan)
        if needed is not None and needed <= usable_bytes:
            return candidate, tuple(
                PassedOver(
                    rung=rung_name(one.rung),
                    plan=one.plan,
                    peak_allocated_bytes=estimated,
                    usable_bytes=usable_bytes,
                )
                for one, estimated in passed
                if one.position <= candidate.position
            )
        if needed is None or needed < _SURE * usable_bytes:
            break
        passed.append((candidate, needed))
    return first, ()


def usable_bytes(event: OOMEvent) -> int | None:
    """What the process could have when it failed; `None` where the failure does not tell.

    That is what was free and what it held already, so that CUDA's context and other processes are
    left out. Where nothing at all was free, the failure had another cause than the card's size.
    """
    held = event.reserved_bytes or event.allocated_bytes
    if not event.free_bytes or held is None:
        return None
    return event.free_bytes + held


def is_padded(event: OOMEvent) -> bool:
    """Whether what failed is known to be rows of one width."""
    if event.rows is None or event.width is None:
        return False
    return event.tokens == event.rows * event.width


def as_failed(plan: Plan, event: OOMEvent) -> Plan:
    """`plan` for a batch as long as the one that failed, and of as many rows."""
    length = min((n for n in (plan.max_length, event.width) if n is not None), default=None)
    rows = plan.micro_batch_size or plan.per_device_train_batch_size
    fewer = event.rows is not None and event.rows < rows
    return replace(
        plan, max_length=length, micro_batch_size=event.rows if fewer else plan.micro_batch_size
    )


def failing_again(event: OOMEvent, plan: Plan) -> OOMEvent:
    """The failure that the same batch would meet under `plan`."""
    if event.rows is None or event.width is None or event.tokens is None:
        return event
    width = min(event.width, plan.max_length or event.width)
    each = event.tokens * width // (event.rows * event.width)  # of a row, or a pair of rows
    limit = event.rows if plan.max_pass_tokens is None else plan.max_pass_tokens // max(1, each)
    rows = max(1, min(event.rows, limit))
    return replace(event, rows=rows, width=width, tokens=rows * each)
