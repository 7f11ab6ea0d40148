"""What a person is told of growing memory: what, how fast, since when, who, and what to do."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from oomguard.memory.size import format_bytes
from oomguard.watch.findings import Finding

if TYPE_CHECKING:
    from oomguard.watch.creep import Creep
    from oomguard.watch.holding import Holding
    from oomguard.watch.inquiry import Conclusion

_PHASES = {
    "train": "in the training steps",
    "eval": "with every evaluation",
    "save": "with every checkpoint",
    "epoch": "with every epoch",
    "recovery": "with every recovery from an out-of-memory",
}
_ADVICE_WITHOUT_HOLDER = (
    "nothing in Python holds it, so look at extensions, compiled code and hooks; "
    "LeakDetector(record_history=True) says where it was allocated"
)
_ADVICE_UNKNOWN = (
    "look for what is kept from step to step: outputs or losses in a list, hooks, caches"
)
_ADVICE_RECOVERY = (
    "do not keep the errors that were recovered from, nor log them with exc_info; their tracebacks "
    "hold the tensors of the failed step"
)
_ADVICE_CYCLES = (
    "break the cycle (a weakref, or del of one attribute), or call gc.collect() every so many "
    "steps; the collector does not see how large a tensor is, and comes late"
)


def tell(conclusion: Conclusion, step: int, memory: str) -> Finding:
    """The finding that an inquiry ends with.

    Args:
        conclusion: Of the inquiry.
        step: Where it ended.
        memory: What was measured, such as `"GPU memory"`.
    """
    creep, collected = conclusion.creep, conclusion.collected
    if collected is not None:
        holder = collected.holder
        text = (
            f"{memory} that only the garbage collector frees grows {growth(creep)}. It waits in "
            f"reference cycles{f', as in {holder}' if holder else ''}."
        )
        return Finding(
            kind="cycles",
            message=f"{text} What to do: {_ADVICE_CYCLES}.",
            step=step,
            holder=holder,
            advice=_ADVICE_CYCLES,
            **measured(creep),
        )
    text = f"{memory} grows {growth(creep)}.{_full(creep)}{_held(conclusion)}"
    if conclusion.stacks:
        text += f" Allocated at {'; '.join(conclusion.stacks)}."
    chain = conclusion.holdings[0].chain if conclusion.holdings else None
    advice = _advice(conclusion)
    return Finding(
        kind="leak",
        message=f"{text} What to do: {advice}.",
        step=step,
        holder=None if chain is None else chain.text,
        stacks=conclusion.stacks,
        advice=advice,
        **measured(creep),
    )


def growth(creep: Creep) -> str:
    """As in `by 1.00 MiB a step since step 120, 93.00 MiB so far, in the training steps`."""
    phase = _PHASES.get(creep.phase, f"with every {creep.phase}")
    return (
        f"by {format_bytes(round(creep.bytes_per_step))} a step since step {creep.since_step}, "
        f"{format_bytes(creep.bytes_so_far)} so far, {phase}"
    )


def _full(creep: Creep) -> str:
    if creep.full_at_step is None:
        return ""
    first, last = creep.full_at_step
    if first == last:
        return f" At this rate it is full at step {first:,}."
    return f" At this rate it is full between steps {first:,} and {last:,}."


def measured(creep: Creep) -> dict[str, Any]:
    """The fields of a `Finding` that a creep tells."""
    return {
        "bytes_per_step": creep.bytes_per_step,
        "since_step": creep.since_step,
        "bytes_so_far": creep.bytes_so_far,
        "phase": creep.phase,
        "full_at_step": creep.full_at_step,
    }


def in_steps_of_run(creep: Creep, first_step: int) -> Creep:
    """A creep that counts from where the run was resumed, in steps of the whole run."""
    full = creep.full_at_step
    return replace(
        creep,
        since_step=creep.since_step + first_step,
        full_at_step=None if full is None else (full[0] + first_step, full[1] + first_step),
    )


def _held(conclusion: Conclusion) -> str:
    if not conclusion.holdings:
        return ""
    said = [_holding(holding, conclusion.apart_steps) for holding in conclusion.holdings]
    return f" Held by {'; then '.join(said)}."


def _holding(holding: Holding, apart_steps: int | None) -> str:
    chain = "nothing in Python" if holding.chain is None else holding.chain.text
    if holding.manner == "grown":
        return f"{chain}, replaced by a larger one again and again, now {holding.tensors}"
    over = "one round" if apart_steps is None else f"{apart_steps} steps"
    kept = f"{holding.count} tensors such as {holding.tensors}"
    if holding.manner == "graph":
        kept = f"the autograd graph of {holding.tensors} ({holding.node})"
    return f"{chain}: {kept}, {format_bytes(holding.size_bytes)} from {over}"


def _advice(conclusion: Conclusion) -> str:
    if not conclusion.holdings:
        return _ADVICE_RECOVERY if conclusion.creep.phase == "recovery" else _ADVICE_UNKNOWN
    return holding_advice(conclusion.holdings[0])


def holding_advice(holding: Holding) -> str:
    """What lets go of it."""
    chain = holding.chain
    if chain is None:
        return _ADVICE_WITHOUT_HOLDER
    if holding.manner == "traceback":
        return (
            "keep str(error) instead of the exception, whose traceback holds the variables of "
            "every function it came through"
        )
    if holding.manner == "graph":
        return (
            "keep numbers (loss.item()) or tensor.detach(), so that the graph can go with all that "
            "it saved for backward"
        )
    if holding.manner == "grown":
        return (
            "begin a new one every batch, or bound its length (a key-value cache: use_cache=False)"
        )
    if chain.leads_through(torch.optim.Optimizer):
        return (
            "drop the old trainer and its optimizer (del, then gc.collect()) before the next one "
            "is made"
        )
    if chain.leads_through(types.FunctionType):
        return "remove the hook (handle.remove()) once it is not needed, or empty what it fills"
    if chain.leads_through(nn.Module):
        return "bound what the module keeps, or empty it after every step"
    return "empty it, bound its length, or keep numbers or .detach().cpu() copies"
