"""`fit` and `Guard`: what they refuse before anything is trained."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import oomguard
from oomguard import ConfigurationError, Guard, Ladder, SplitBatch
from oomguard.errors import UnsupportedTrainerError
from tests.kinds import is_left_alone, make


@pytest.mark.parametrize("trainer", [None, "x", Trainer])
def test_what_is_no_trainer_is_refused_and_shown(trainer: Any) -> None:
    with pytest.raises(UnsupportedTrainerError, match="needs a transformers Trainer") as caught:
        oomguard.fit(trainer)
    assert repr(trainer) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_find_batch_size": True}, "set auto_find_batch_size=False"),
        ({"optim": "lomo"}, "optim='lomo' updates weights inside backward"),
        ({"optim": "galore_adamw_layerwise"}, "choose another optim"),
    ],
)
def test_a_setting_that_rules_out_an_exact_recovery_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    trainer = make(tmp_path, **changes)
    with pytest.raises(UnsupportedTrainerError, match=words):
        oomguard.fit(trainer)
    assert type(trainer) is Trainer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_sharded_training_is_refused_by_its_setting(tmp_path: Path, name: str) -> None:
    trainer = make(tmp_path)
    assert getattr(trainer, f"is_{name}_enabled") is False
    setattr(trainer, f"is_{name}_enabled", True)  # as Trainer does where the package is installed
    with pytest.raises(UnsupportedTrainerError, match=rf"without args\.{name}"):
        oomguard.fit(trainer)


PROCESS = """
import os
import sys
from pathlib import Path
import oomguard
from oomguard.errors import UnsupportedTrainerError
from tests.kinds import make
try:
    oomguard.fit(make(Path(sys.argv[1])))
except UnsupportedTrainerError as error:
    print(f"rank {os.environ['RANK']}: {error}\\n", end="", flush=True)
"""


@pytest.mark.slow
def test_each_of_two_processes_is_refused_and_ends(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PROCESS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    output = subprocess.run(  # noqa: S603 - the script above
        [*launch, script, tmp_path], stdout=-1, text=True, timeout=120, check=True, env=environment
    ).stdout
    refused = sorted(line for line in output.splitlines() if line.startswith("rank "))
    assert [line[:8] for line in refused] == ["rank 0: ", "rank 1: "]
    assert all("2 processes train together" in line for line in refused)


@pytest.mark.parametrize("ladder", ["fast", [SplitBatch()], None])
def test_an_unknown_ladder_is_refused_before_training(tmp_path: Path, ladder: Any) -> None:
    trainer = make(tmp_path)
    with pytest.raises(ConfigurationError, match=r"Unknown ladder .*; use 'default'"):
        oomguard.fit(trainer, ladder=ladder)
    assert (type(trainer), trainer.state.global_step) == (Trainer, 0)


def test_an_empty_ladder_is_refused_with_an_example() -> None:
    with pytest.raises(ConfigurationError, match="at least one rung, for example"):
        Ladder()


def test_a_guard_inside_a_guard_is_refused_and_the_outer_one_goes_on(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    second = Guard(trainer)
    with Guard(trainer) as guard:
        for attempt in (lambda: oomguard.fit(trainer), lambda: Guard(trainer), second.__enter__):
            with pytest.raises(UnsupportedTrainerError, match="inside a Guard already"):
                attempt()
        trainer.train()
    assert guard.report.status == "finished"
    assert is_left_alone(trainer)


@pytest.mark.parametrize("name", ["compute_loss", "training_step", "get_batch_samples"])
def test_a_method_that_was_set_on_the_trainer_itself_is_refused(tmp_path: Path, name: str) -> None:
    trainer = make(tmp_path)
    setattr(trainer, name, types.MethodType(getattr(Trainer, name), trainer))
    with pytest.raises(oomguard.UnsupportedTrainerError, match=name):
        oomguard.fit(trainer)
