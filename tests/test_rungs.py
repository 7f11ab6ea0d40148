"""The rungs on optimizer and adapters, and those of no preset, as pure decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomguard import ConfigurationError, Fidelity, OOMEvent, Plan
from oomguard.ladder import Ladder
from oomguard.levers import adapter
from oomguard.rung import rung_relieves
from oomguard.rungs import (
    CheckpointActivations,
    LowerRank,
    NarrowTargets,
    OffloadActivations,
    PageOptimizer8bit,
    ReleaseCache,
)
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FORWARD = OOMEvent(phase="forward", step=3)
PLAN = Plan(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    optim="adamw_torch_fused",
    target_modules=("down_proj", "up_proj", "q_proj", "v_proj"),
    lora_r=16,
)


def walk(rung: Callable[[Plan, OOMEvent], Plan | None], plan: Plan = PLAN) -> list[Plan]:
    """Every plan that a rung leads to."""
    plans: list[Plan] = []
    after = rung(plan, FORWARD)
    while after is not None:
        plans.append(after)
        after = rung(after, FORWARD)
    return plans


def test_the_optimizer_is_paged_once() -> None:
    assert [plan.optim for plan in walk(PageOptimizer8bit())] == ["paged_adamw_8bit"]


def test_targets_go_one_by_one_the_largest_first_or_all_at_once() -> None:
    one_by_one = [plan.target_modules for plan in walk(NarrowTargets())]
    assert one_by_one == [("up_proj", "q_proj", "v_proj"), ("q_proj", "v_proj")]
    at_once = [plan.target_modules for plan in walk(NarrowTargets(at_once=True))]
    assert at_once == [("q_proj", "v_proj")]
    assert walk(NarrowTargets(keep=("k_proj",))) == []
    spent = NarrowTargets(keep=("k_proj",)).spent(PLAN, FORWARD)
    assert "none of keep=('k_proj',) has an adapter" in spent


@given(rank=st.integers(1, 512), floor=st.integers(1, 64))
def test_the_rank_is_halved_down_to_its_floor(rank: int, floor: int) -> None:
    plan = Plan(per_device_train_batch_size=1, lora_r=rank)
    ranks = [after.lora_r or 0 for after in walk(LowerRank(floor=floor), plan)]
    assert ranks == sorted(ranks, reverse=True)
    assert all(floor <= r < rank for r in ranks)
    assert not ranks or ranks[-1] == floor
    assert {after.effective_batch_size for after in walk(LowerRank(), plan)} <= {1}


def test_checkpoints_are_offloaded_only_where_there_are_some() -> None:
    assert walk(OffloadActivations()) == []
    assert "gradient_checkpointing is off" in OffloadActivations().spent(PLAN, FORWARD)
    checkpointed = CheckpointActivations()(PLAN, FORWARD)
    assert checkpointed is not None
    assert [plan.offload_activations for plan in walk(OffloadActivations(), checkpointed)] == [True]


@pytest.mark.parametrize(
    ("reserved", "allocated", "free", "asked", "acts"),
    [
        (1000, 700, 0, 200, True),
        (1000, 700, 0, 400, False),  # what is cached and free is not enough
        (1000, 700, 150, 400, True),
        (1000, 900, 0, 50, False),  # little is cached
        (None, None, 0, 50, False),
    ],
)
def test_the_cache_is_released_where_memory_is_fragmented_once_a_step(
    reserved: int | None, allocated: int | None, free: int, asked: int, acts: bool
) -> None:
    facts: dict[str, Any] = {
        "phase": "forward",
        "reserved_bytes": reserved,
        "allocated_bytes": allocated,
        "free_bytes": free,
        "asked_bytes": asked,
    }
    after = ReleaseCache()(PLAN, OOMEvent(step=3, **facts))
    assert (after is not None) is acts
    if after is not None:
        assert after.cache_released_step == 3
        assert ReleaseCache()(after, OOMEvent(step=3, **facts)) is None
        assert "released in step 3 already" in ReleaseCache().spent(
            after, OOMEvent(step=3, **facts)
        )
        assert ReleaseCache()(after, OOMEvent(step=4, **facts)) is not None
        assert "cache released" in PLAN.describe_change(after)


def test_rungs_of_passes_free_nothing_once_the_backward_pass_is_over() -> None:
    relieving = [rung for rung in Ladder.of("default") if rung_relieves(rung, "optimizer")]
    assert relieving == [PageOptimizer8bit(), NarrowTargets(), LowerRank()]
    assert all(rung_relieves(rung, "forward") for rung in Ladder.of("default"))
    assert rung_relieves(lambda plan, event: None, "optimizer")


def test_each_declares_what_it_does_to_the_result() -> None:
    fidelities = [
        rung.fidelity
        for rung in (
            PageOptimizer8bit(), NarrowTargets(), LowerRank(), OffloadActivations(), ReleaseCache()
        )
    ]  # fmt: skip
    assert fidelities == [
        Fidelity.NUMERIC, Fidelity.SEMANTIC, Fidelity.SEMANTIC, Fidelity.EXACT, Fidelity.EXACT,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NarrowTargets(keep="q_proj"), "give a tuple of names"),  # type: ignore[arg-type]
        (lambda: NarrowTargets(keep=()), "give a tuple of names"),
        (lambda: LowerRank(floor=0), "floor must be a rank"),
        (lambda: LowerRank(floor=True), "floor must be a rank"),
        (lambda: ReleaseCache(share=1.0), "share must be from 0 to below 1"),
    ],
)
def test_nonsense_is_refused_when_it_is_made(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_a_trainer_that_switches_adapters_off_and_on_cannot_narrow_them(tmp_path: Path) -> None:
    trainer: Any = tiny.sft_trainer(tmp_path)
    assert adapter.refusal(trainer, {"q_proj", "v_proj"}) is None
    trainer.ref_model = None
    assert "for its reference" in str(adapter.refusal(trainer, {"q_proj", "v_proj"}))
    del trainer.ref_model
    assert "no adapter would be left" in str(adapter.refusal(trainer, {"elsewhere"}))
