"""Memory that runs out while completions are sampled: made good once, then named, never hidden."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from trl import GRPOTrainer, RLOOTrainer

import oomguard
from oomguard.hooks import GuardedRollouts
from oomguard.ladder import Ladder
from oomguard.levers.activations import is_checkpointing
from oomguard.levers.journal import Journal
from oomguard.rungs import SplitBatch
from oomguard.testing import VirtualCard
from tests import tiny
from tests.sampling import grpo, reward_calls
from tests.tiny import largest_difference, weights
from tests.twin import EXACT, Build, assert_same, run, twin
from tests.upstream import calls

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = tiny.needs_rows_of_pairs


class Failing(GRPOTrainer):
    """Runs out of memory in the named method, each time as long as `faults` says so."""

    method = ""
    faults = 0
    made = 0

    def _generate(self, prompts: Any) -> Any:
        return self.fail("generate", lambda: super(Failing, self)._generate(prompts))

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        call = super()._get_per_token_logps_and_entropies
        return self.fail("score", lambda: call(*args, **kwargs))

    def _calculate_rewards(self, *args: Any) -> Any:
        call = super()._calculate_rewards
        return self.fail("reward", lambda: call(*args))

    def fail(self, where: str, action: Any) -> Any:
        type(self).made += where == "generate"
        with ExitStack() as cards:
            if type(self).method == where and type(self).faults:
                type(self).faults -= 1
                cards.enter_context(VirtualCard(fail_at=1 if where == "reward" else 20))
            return action()


def failing(method: str, faults: int) -> Build:
    own = type("Own", (Failing,), {"method": method, "faults": faults, "made": 0})
    return partial(grpo, trainer_class=own, beta=0.1, num_iterations=2)


@pytest.mark.parametrize("method", ["generate", "score", "reward"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_error_while_sampling_is_made_good_bit_by_bit(
    tmp_path: Path, method: str, checkpointing: bool
) -> None:
    settings = {"gradient_checkpointing": checkpointing}
    plain: Any = failing("", 0)(tmp_path, **settings)
    plain.train()
    trainer: Any = failing(method, 1)(tmp_path, **settings)
    report = oomguard.fit(trainer)
    (recovery,) = report.recoveries
    assert (recovery.event.phase, recovery.event.step, recovery.rung) == ("generate", 1, None)
    assert recovery.before == recovery.after
    assert largest_difference(weights(trainer), weights(plain)) == 0.0
    assert is_checkpointing(trainer) == checkpointing
    assert trainer.model.is_gradient_checkpointing == checkpointing  # TRL leaves it off
    assert trainer.state.num_input_tokens_seen == plain.state.num_input_tokens_seen
    assert trainer._logs == plain._logs


def test_what_was_sampled_is_not_sampled_again_when_the_step_is_made_again() -> None:
    for settings in (
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4},
        {"steps_per_generation": 4},
        {"num_iterations": 2},
    ):
        trainers: list[Any] = []

        def build(folder: Path, settings: Any = settings, trainers: Any = trainers) -> Any:
            trainers.append(grpo(folder, **settings))
            return trainers[-1]

        plain = run(build)
        # In the last batch of a step: what was sampled for earlier ones is needed again.
        batches = settings.get("gradient_accumulation_steps", 2)
        recovered = run(
            build, Ladder(oomguard.CheckpointActivations()), {("backward", batches): 30}
        )
        assert_same(recovered, plain, EXACT)
        assert reward_calls(trainers[0]) == reward_calls(trainers[1]) > 0
        assert trainers[0]._logs == trainers[1]._logs


def allocations_until_rewarded(trainer: Any) -> int:
    """How many allocations a training makes until the reward function is first asked."""
    ask, found = trainer.reward_funcs[0], []

    def asked(**kwargs: Any) -> Any:
        found.append(card.allocations)
        return ask(**kwargs)

    trainer.reward_funcs[0] = asked
    with VirtualCard(fail_at=10**9) as card:
        oomguard.fit(trainer)
    return int(found[0])


@pytest.mark.parametrize("further", [4, 8, 20])
def test_what_fails_behind_the_rewards_does_not_ask_for_them_again(
    tmp_path: Path, further: int
) -> None:
    plain: Any = grpo(tmp_path)
    plain.train()
    behind = allocations_until_rewarded(grpo(tmp_path)) + further
    trainer: Any = grpo(tmp_path)
    with VirtualCard(fail_at=behind):
        (recovery,) = oomguard.fit(trainer).recoveries
    assert recovery.event.phase == "generate"
    assert reward_calls(trainer) == reward_calls(plain)
    assert largest_difference(weights(trainer), weights(plain)) == 0.0
    assert trainer._logs == plain._logs


def test_sampling_that_does_not_fit_is_named_and_never_shrinks_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Any = failing("generate", 2)(tmp_path)
    before = weights(trainer)
    with (
        caplog.at_level(logging.INFO, "oomguard"),
        pytest.raises(oomguard.LadderExhaustedError) as e,
    ):
        oomguard.fit(trainer, ladder="exact_first")
    text = str(e.value)
    assert "Out of memory while completions were generated and scored for optimizer step 1" in text
    for setting in (
        "generation_batch_size (now 8)",
        "num_generations (now 4)",
        "per_device_train_batch_size (now 4)",
        "max_completion_length (now 12)",
    ):
        assert setting in text
    saved = oomguard.Report.load(tmp_path / "oomguard.json")
    assert saved.plan == saved.initial_plan
    assert [recovery.rung for recovery in saved.recoveries] == [None]
    assert "out of memory in generate" in caplog.text
    assert largest_difference(weights(trainer), before) == 0.0


def test_the_completions_tell_how_large_the_pass_was_that_failed() -> None:
    recovered = run(grpo, Ladder(SplitBatch()), {("forward", 1): 40})
    event = recovered.recoveries[0].event
    assert (event.phase, event.rows) == ("forward", 4)
    assert event.tokens == 4 * (event.width or 0) > 0
    assert twin(grpo).logs


@pytest.mark.parametrize("upstream", [GRPOTrainer, RLOOTrainer])
def test_a_trainer_that_samples_does_so_where_the_guard_expects_it(upstream: Any) -> None:
    ours = {name for name, value in vars(GuardedRollouts).items() if inspect.isfunction(value)}
    assert ours == {"_prepare_inputs", "_calculate_rewards", "compute_loss"}
    assert ours <= vars(upstream).keys(), f"{upstream.__name__} has lost one of {ours}"
    prepare = calls(upstream._prepare_inputs)
    assert "self._generate_and_score_completions" in prepare
    scoring = calls(upstream._generate_and_score_completions)
    assert scoring.index("self._generate") < scoring.index("self._calculate_rewards")
    counted = "self.state.num_input_tokens_seen +="
    assert counted in inspect.getsource(upstream._generate), "see Rollouts.prepare"
    assert upstream.loss_is_scaled_for_ga is (upstream is GRPOTrainer), "see rollout_step._backward"
    step = calls(upstream.training_step)
    assert "super().training_step" in step, "see RolloutTransaction.in_passes"


class Counting:
    def __init__(self) -> None:
        self.number, self.flag, self.same = 1, False, 5
        self.entries: dict[str, Any] = {"old": [1], "replaced": [1]}
        self.recent = deque([1, 2], maxlen=2)
        self.buffer: Any = None

    def act(self) -> None:
        self.number += 2
        self.entries["old"].append(2)
        self.entries["new"] = [3]
        self.entries["replaced"] = [9]
        self.recent.append(3)
        self.buffer = [4]


def test_a_journal_does_again_what_was_done_whatever_came_between() -> None:
    once = Counting()
    journal = Journal(once)
    once.act()
    journal.close()
    again = Counting()
    vars(once).update(vars(again))
    once.entries["old"].append(7)
    journal.repeat()
    assert (once.number, once.same, once.buffer) == (3, 5, [4])
    assert once.entries == {"old": [1, 7, 2], "replaced": [9], "new": [3]}
    assert list(once.recent) == [2, 3]
    assert once.recent.maxlen == 2
