"""Which plans a search looks at: pure."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from oomguard.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from oomguard.plan import Plan

MAXIMIZE = ("tokens", "max_length", "micro_batch_size", "lora_r", "throughput")
SWITCHES = ("gradient_checkpointing", "offload_activations", "optim", "target_modules")
NUMBERS = ("micro_batch_size", "max_length", "lora_r")
FREE = (*SWITCHES, *NUMBERS)

_STEP = 8  # tokens between two lengths: what tensor cores like
_SHORTEST = 256  # tokens that max_length is not brought below; HalveSequence's floor too
_SMALLEST_RANK = 4  # what lora_r is not brought below; LowerRank's floor too
_MOST_ROWS = 4096
_MOST_TOKENS = 2**20
_PAGED_8BIT = "paged_adamw_8bit"
_ATTENTION = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Axis:
    """A number of the plan that a search may change.

    Attributes:
        name: One of `NUMBERS`.
        values: What it may be, in ascending order.
        current: What the search starts from, or the next smaller of the values.
        grows: Whether it is maximized. If not, it gives way where nothing fits otherwise, and only
            as far as needed.
    """

    name: str
    values: Sequence[int]
    current: int
    grows: bool


@dataclass(frozen=True)
class Space:
    """The plans of a search.

    Attributes:
        maximize: One of `MAXIMIZE`.
        variants: The plan that the search starts from, and the same with freed switches set
            otherwise; the least changed first.
        axes: The numbers that move; those that grow come first.
        keeps_batch: Whether the effective batch is kept by accumulation. If not, a pass is a step.
    """

    maximize: str
    variants: tuple[Plan, ...]
    axes: tuple[Axis, ...]
    keeps_batch: bool

    def at(self, plan: Plan, name: str, value: int) -> Plan:
        """`plan` with one of `NUMBERS` set."""
        if name == "max_length":
            return replace(plan, max_length=value)
        if name == "lora_r":
            return replace(plan, lora_r=value)
        steps = plan.effective_batch_size // (value * plan.world_size) if self.keeps_batch else 1
        return replace(
            plan,
            per_device_train_batch_size=value,
            gradient_accumulation_steps=steps,
            micro_batch_size=value,
            max_pass_tokens=None,
        )

    def size(self, plan: Plan) -> int:
        """What is maximized; of plans to be measured, their tokens a pass."""
        rows = plan.per_device_train_batch_size
        sizes = {
            "max_length": plan.max_length or 0,
            "micro_batch_size": rows,
            "lora_r": plan.lora_r or 0,
        }
        return sizes.get(self.maximize, rows * (plan.max_length or 1))

    @property
    def smallest(self) -> Plan:
        """The plan that needs the least memory of all."""
        plan = max(self.variants, key=_savings)
        for axis in self.axes:
            plan = self.at(plan, axis.name, axis.values[0])
        return plan


def space(
    start: Plan,
    maximize: str,
    free: Sequence[str] = (),
    *,
    keeps_batch: bool,
    longest: int | None = None,
    most_tokens: int | None = None,
    largest_rank: int | None = None,
) -> Space:
    """The plans around `start`.

    Args:
        start: What the search starts from; `max_length` is set.
        maximize: One of `MAXIMIZE`.
        free: Of `SWITCHES` and `NUMBERS`, what may change besides what is maximized.
        keeps_batch: Whether every plan has the effective batch of `start`. If not, passes may have
            any number of rows.
        longest: Tokens that no row is longer than, as where the rows are there already; `None`
            where rows of any length can be had.
        most_tokens: Tokens of the longest row that the model can take.
        largest_rank: What `lora_r` is not raised above.

    Raises:
        ConfigurationError: `maximize` or `free` names nothing that can be searched.
    """
    _check(start, maximize, free)
    own_rows = start.micro_batch_size or start.per_device_train_batch_size
    length = start.max_length or _SHORTEST
    rows = _rows(start, keeps_batch=keeps_batch)
    axes = []
    if maximize in {"tokens", "micro_batch_size", "throughput"}:
        axes.append(Axis("micro_batch_size", rows, rows[0], grows=True))
    elif "micro_batch_size" in free:
        fewer = [number for number in rows if number <= own_rows]
        axes.append(Axis("micro_batch_size", fewer, fewer[-1], grows=False))
    if maximize == "max_length" or (maximize == "tokens" and longest is None):
        most = min(longest or _MOST_TOKENS, most_tokens or _MOST_TOKENS)
        axes.append(_axis("max_length", _lengths(length, most), length, grows=True))
    elif "max_length" in free:
        axes.append(_axis("max_length", _lengths(length, length), length, grows=False))
    if start.lora_r is not None and maximize == "lora_r":
        ranks = range(1, max(start.lora_r, largest_rank or start.lora_r) + 1)
        axes.append(_axis("lora_r", ranks, ranks[0], grows=True))
    elif start.lora_r is not None and "lora_r" in free:
        ranks = range(min(start.lora_r, _SMALLEST_RANK), start.lora_r + 1)
        axes.append(_axis("lora_r", ranks, start.lora_r, grows=False))
    axes.sort(key=lambda axis: not axis.grows)
    return Space(maximize, _variants(start, free), tuple(axes), keeps_batch)


def _axis(name: str, values: Sequence[int], wanted: int, *, grows: bool) -> Axis:
    """With the largest value up to `wanted` as the current one."""
    return Axis(name, values, values[max(0, bisect_right(values, wanted) - 1)], grows)


def _rows(start: Plan, *, keeps_batch: bool) -> Sequence[int]:
    if not keeps_batch:
        return range(1, _MOST_ROWS + 1)
    batch = start.effective_batch_size // start.world_size
    return [number for number in range(1, batch + 1) if batch % number == 0]


def _lengths(own: int, longest: int) -> Sequence[int]:
    """Multiples of 8 up to the longest, that itself, and the one that the search starts from."""
    first = min(own, longest, _SHORTEST)
    multiples = range(first + -first % _STEP, longest + 1, _STEP)
    return sorted({first, *multiples, min(own, longest), longest})


def _savings(plan: Plan) -> tuple[bool, bool, bool, int]:
    return (
        plan.gradient_checkpointing,
        plan.offload_activations,
        plan.optim == _PAGED_8BIT,
        -len(plan.target_modules or ()),
    )


def _variants(start: Plan, free: Sequence[str]) -> tuple[Plan, ...]:
    """Every combination of freed switches, those with the fewest changes first."""
    options: list[list[dict[str, object]]] = []
    if "gradient_checkpointing" in free:
        options.append([{}, {"gradient_checkpointing": not start.gradient_checkpointing}])
    if "offload_activations" in free and not start.offload_activations:
        options.append([{}, {"offload_activations": True}])
    if "optim" in free and start.optim not in {None, _PAGED_8BIT}:
        options.append([{}, {"optim": _PAGED_8BIT}])
    fewer = tuple(name for name in start.target_modules or () if name in _ATTENTION)
    if "target_modules" in free and fewer and fewer != start.target_modules:
        options.append([{}, {"target_modules": fewer}])
    combinations = sorted(product(*options), key=lambda made: sum(map(bool, made)))
    plans = []
    for made in combinations:
        plan = start
        for change in made:
            plan = replace(plan, **change)  # type: ignore[arg-type]
        if plan.gradient_checkpointing or not plan.offload_activations:
            plans.append(plan)
    return tuple(plans)


def _check(start: Plan, maximize: str, free: Sequence[str]) -> None:
    if maximize not in MAXIMIZE:
        msg = f"maximize={maximize!r}: give one of {', '.join(MAXIMIZE)}"
        raise ConfigurationError(msg)
    if isinstance(free, str):
        msg = f"free={free!r}: give a tuple of names, such as ({free!r},)"
        raise ConfigurationError(msg)
    unknown = [name for name in free if name not in FREE]
    if unknown:
        msg = f"free names {unknown[0]!r}: what can be freed is {', '.join(FREE)}"
        raise ConfigurationError(msg)
    if start.lora_r is None and (maximize == "lora_r" or "lora_r" in free):
        msg = "lora_r cannot be searched in a full fine-tune: train LoRA adapters (lora_r=16)"
        raise ConfigurationError(msg)
