"""Rungs that change what is trained with: the step that failed is redone as if nothing had been."""

from __future__ import annotations

import logging
from functools import cache, partial
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, set_seed

import oomguard
from oomguard import LowerRank, NarrowTargets, OOMEvent, PageOptimizer8bit
from oomguard.ladder import Ladder
from oomguard.levers.live import Levers, read_plan
from oomguard.testing import VirtualCard
from tests import tiny
from tests.kinds import fit
from tests.twin import Build, Faults, Run, assert_same, run, sft, twin

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Trainer

    from oomguard import Rung

ADAPTERS = LoraConfig(
    r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM"
)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}


@cache
def saved_model() -> str:
    """A folder with the weights of the tiny Llama, to be loaded in 4 bits."""
    folder = mkdtemp(prefix="oomguard-")
    tiny.llama(**SIZES).save_pretrained(folder)
    return folder


def lora(folder: Path, **changes: Any) -> Trainer:
    return sft(folder, model=tiny.llama(**SIZES), lora=ADAPTERS, **{"max_steps": 4, **changes})


def pissa(folder: Path, **changes: Any) -> Trainer:
    adapters = LoraConfig(**{**ADAPTERS.to_dict(), "init_lora_weights": "pissa"})
    model = tiny.llama(**SIZES)
    return sft(folder, model=model, lora=adapters, **{"max_steps": 4, **changes})


def full(folder: Path, **changes: Any) -> Trainer:
    return sft(folder, model=tiny.llama(**SIZES), lora=None, max_steps=4, **changes)


def qlora(folder: Path, *, prepared: bool, **changes: Any) -> Trainer:
    path = saved_model()
    set_seed(0)  # adapters may be drawn before the trainer sets its own
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4)
    if prepared:
        # Checkpointing is off, so that the ladder has it to take.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return sft(folder, model=model, lora=ADAPTERS, max_steps=4, **changes)


def qlora_by_path(folder: Path, **changes: Any) -> Trainer:
    path = saved_model()
    set_seed(0)
    load = {"quantization_config": NF4, "dtype": "float32"}
    return sft(folder, model=path, lora=ADAPTERS, max_steps=4, model_init_kwargs=load, **changes)


def qlora_wrapped(folder: Path, **changes: Any) -> Trainer:
    base = AutoModelForCausalLM.from_pretrained(saved_model(), quantization_config=NF4)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    set_seed(0)
    model: Any = get_peft_model(base, ADAPTERS)
    return sft(folder, model=model, lora=None, max_steps=4, **changes)


BUILDS: dict[str, Build] = {
    "LoRA": lora,
    "PiSSA": pissa,
    "QLoRA": partial(qlora, prepared=False),
    "QLoRA prepared": partial(qlora, prepared=True),
    "QLoRA by path": qlora_by_path,
    "QLoRA wrapped": qlora_wrapped,
    "full": full,
}
RUNGS: dict[str, Rung] = {
    "PageOptimizer8bit": PageOptimizer8bit(),
    "NarrowTargets": NarrowTargets(),
    "NarrowTargets at once": NarrowTargets(at_once=True),
    "LowerRank": LowerRank(),
}
# The others are the same for them.
ONLY = {
    "full": {"PageOptimizer8bit"},
    "QLoRA wrapped": {"PageOptimizer8bit"},
    "PiSSA": {"LowerRank"},
}
CASES = [(build, rung) for build in BUILDS for rung in RUNGS if rung in ONLY.get(build, RUNGS)]


class Take(TrainerCallback):
    """Makes the trainer obey what a rung says at the beginning of its second step."""

    def __init__(self, trainer: Any, rung: Rung) -> None:
        self.trainer, self.rung = trainer, rung
        self.levers = Levers(trainer, trainer.compute_loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            before = read_plan(self.trainer)
            after = self.rung(before, OOMEvent(phase="forward", step=2))
            assert after is not None
            self.levers.apply(before, after)


@cache
def planned(build: str, rung: str) -> Run:
    """The run that changes its plan before the second step, without an error."""

    def with_callback(folder: Path) -> Trainer:
        trainer = BUILDS[build](folder)
        trainer.add_callback(Take(trainer, RUNGS[rung]))
        return trainer

    return run(with_callback)


@pytest.mark.parametrize(("build", "rung"), CASES)
def test_the_step_that_failed_is_that_of_the_run_which_took_the_rung_before_it(
    build: str, rung: str
) -> None:
    faults: Faults = {("backward", 4): 12}
    recovered = run(BUILDS[build], Ladder(RUNGS[rung]), faults)
    assert recovered.rungs == [rung.partition(" ")[0]]
    without_events = planned(build, rung)
    without_events.events[:] = recovered.events
    # The first batch of the step was counted with the weights that there were then.
    assert_same(recovered, without_events, {"total_flos": 0.02})
    plain = twin(BUILDS[build])
    assert recovered.events == plain.events
    assert recovered.order == plain.order
    assert [line.get("learning_rate") for line in recovered.logs] == [
        line.get("learning_rate") for line in plain.logs
    ]


@pytest.mark.parametrize("build", BUILDS)
def test_a_run_goes_down_the_whole_ladder_and_ends_like_its_twin(build: str) -> None:
    ladder = Ladder(
        oomguard.CheckpointActivations(),
        oomguard.HalveSequence(floor=48),
        oomguard.SplitBatch(),
        PageOptimizer8bit(),
        NarrowTargets(at_once=True),
        LowerRank(),
    )
    expected = ["CheckpointActivations", "HalveSequence", "SplitBatch", "SplitBatch"]
    expected += ["PageOptimizer8bit"]
    if build != "full":
        expected += ["NarrowTargets", "LowerRank"]
    # Each failing call is a new one: the window is replayed pass by pass.
    recovered = run_until(BUILDS[build], ladder, len(expected))
    assert recovered.rungs == expected
    plain = twin(BUILDS[build])
    assert recovered.events == plain.events
    assert recovered.order == plain.order
    assert recovered.report is not None
    batches = {r.after.effective_batch_size for r in recovered.recoveries}
    assert batches == {recovered.report.initial_plan.effective_batch_size}
    rates = [[line.get("learning_rate") for line in r.logs] for r in (recovered, plain)]
    assert rates[0] == rates[1]


def run_until(build: Build, ladder: Ladder, failures: int) -> Run:
    """A run whose forward pass fails in so many calls on end, from the third on."""
    return run(build, ladder, {("forward", 3 + n): 2 for n in range(failures)})


def test_a_spent_ladder_names_all_that_was_taken(tmp_path: Path) -> None:
    trainer = lora(tmp_path)
    with pytest.raises(oomguard.LadderExhaustedError) as caught:
        fit(trainer, 2, 60_000)
    text = str(caught.value)
    assert (
        "CheckpointActivations x 1, PageOptimizer8bit x 1, NarrowTargets x 5, LowerRank x 1" in text
    )
    assert "LowerRank: lora_r=4 is not above floor=4" in text


def test_the_first_step_of_an_optimizer_that_does_not_fit_is_made_in_8_bits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Three tries of the step fail; no rung but this frees anything then."""
    caplog.set_level(logging.INFO, "oomguard")
    recovered = run_with_tight_optimizer()
    assert recovered.rungs[-1] == "PageOptimizer8bit"
    assert {r.event.phase for r in recovered.recoveries} == {"optimizer"}
    assert "CheckpointActivations skipped: it frees nothing in optimizer" in caplog.text
    assert len([line for line in recovered.logs if "loss" in line]) == 4


def run_with_tight_optimizer() -> Run:
    """On a card with room for 8-bit moments, but not for those of torch."""
    card = VirtualCard("1GiB")

    class Tight(TrainerCallback):
        held: Any = None

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **k: Any) -> None:
            if state.global_step == 0:
                weights = sum(p.nbytes for p in k["model"].parameters() if p.requires_grad)
                left = 2**30 - card.live_bytes - int(1.6 * weights)
                self.held = torch.empty(left, dtype=torch.uint8)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.held = None

    def build(folder: Path) -> Trainer:
        trainer = sft(
            folder, model=tiny.llama(hidden_size=128, intermediate_size=256), lora=None, max_steps=4
        )
        trainer.add_callback(Tight())
        return trainer

    return run(build, "default", card=card)
