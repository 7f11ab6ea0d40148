"""Plans and failures to decide on: fixed ones, and those that hypothesis draws."""

from __future__ import annotations

from hypothesis import strategies as st

from oomguard.event import OOMEvent
from oomguard.plan import Plan

COUNTS = st.integers(1, 64)
WIDTHS = st.integers(1, 8192)
PHASES = st.sampled_from(["fetch", "forward", "backward", "clip", "optimizer", "bookkeeping"])
FLOORS = st.integers(2, 8192)
PLANS = st.builds(
    Plan,
    per_device_train_batch_size=COUNTS,
    gradient_accumulation_steps=COUNTS,
    world_size=COUNTS,
    max_length=st.none() | WIDTHS,
    gradient_checkpointing=st.booleans(),
)
PLAN = Plan(per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=2048)
BLIND = OOMEvent(phase="fetch", step=1)


@st.composite
def padded_events(draw: st.DrawFn, rows: st.SearchStrategy[int] = COUNTS) -> OOMEvent:
    """A pass of padded rows: tokens = rows x width."""
    count, width = draw(rows), draw(WIDTHS)
    return OOMEvent(phase=draw(PHASES), step=1, rows=count, width=width, tokens=count * width)


@st.composite
def packed_events(draw: st.DrawFn, documents: st.SearchStrategy[int] = COUNTS) -> OOMEvent:
    """A pass of documents laid end to end: the longest is the width, and none is empty."""
    count, width = draw(documents), draw(WIDTHS)
    tokens = draw(st.integers(width + count - 1, count * width))
    return OOMEvent(phase=draw(PHASES), step=1, rows=count, width=width, tokens=tokens)


def largest_pass(plan: Plan, width: int) -> OOMEvent:
    """The failure of the largest pass that `plan` allows on rows of `width` tokens."""
    width = min(width, plan.max_length or width)
    rows = plan.micro_batch_size or plan.per_device_train_batch_size
    if plan.max_pass_tokens is not None:
        rows = max(1, min(rows, plan.max_pass_tokens // width))
    return OOMEvent(phase="backward", step=1, rows=rows, width=width, tokens=rows * width)
