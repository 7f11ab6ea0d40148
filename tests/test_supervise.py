"""When a script is started again, and that it then ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from oomguard.supervise import Death, Decision, Progress, decide
from tests import tiny

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
CONFIGURATION: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from transformers import TrainerCallback
from tests import tiny, test_supervise

class Dies(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if (what := sys.argv[1:]) and str(state.global_step) == what[1]:
            if what[0] == "crash":
                raise RuntimeError("a bug")
            if what[0] == "wait":
                Path("waiting").touch()
                time.sleep(1)
            elif not Path("killed").exists():
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

def kill():
    Path("killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)

trainer = tiny.sft_trainer(Path("out"), lora=test_supervise.LORA, **test_supervise.CONFIGURATION)
trainer.add_callback(Dies())
if sys.argv[1:2] == ["later"] and not Path("killed").exists():
    threading.Timer(float(sys.argv[2]), kill).start()
trainer.train()
torch.save(tiny.weights(trainer), "weights.pt")
print("the script's last line")
os._exit(0)  # a timer may be waiting
"""


def start(folder: Path, text: str, *arguments: str, options: tuple[str, ...] = ()) -> Any:
    (folder / "script.py").write_text(textwrap.dedent(text), encoding="utf-8")
    command = [sys.executable, "-m", "oomguard", "run", "--json", *options]
    return subprocess.Popen(  # noqa: S603 - it is our own script
        [*command, "script.py", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any) -> tuple[int, str, str, dict[str, Any]]:
    """Exit status, stdout, stderr, and the summary in its last line."""
    out, err = process.communicate(timeout=300)
    assert err.strip(), out
    return process.returncode, out, err, json.loads(err.splitlines()[-1])


def run(folder: Path, text: str, *arguments: str, options: tuple[str, ...] = ()) -> Any:
    return finish(start(folder, text, *arguments, options=options))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("twin")
    trainer = tiny.sft_trainer(folder, lora=LORA, **CONFIGURATION)
    trainer.train()
    return tiny.weights(trainer)


def killed(**changes: Any) -> Death:
    values: dict[str, Any] = {
        "returncode": -9,
        "kind": "signal",
        "progress": Progress(0, 2, 3),
        "stepped": True,
        "output_dir": "out",
        "saves": "save_strategy='steps', save_steps=500",
    }
    return Death(**{**values, **changes})


@pytest.mark.parametrize(
    "death",
    [
        killed(),
        killed(progress=Progress(), stepped=False, output_dir=None),
        killed(returncode=1, kind="crash"),
        killed(returncode=1, kind="cuda", stepped=False),
        killed(returncode=-11),
    ],
)
def test_a_first_death_is_followed_by_a_restart(death: Death) -> None:
    assert decide(death, None, 0, 3) == Decision(restart=True)


@pytest.mark.parametrize(
    "death",
    [
        killed(returncode=3, kind="final"),
        killed(returncode=143, kind="stopped"),
        killed(returncode=1, kind="crash", stepped=False),
    ],
)
def test_what_a_restart_would_only_repeat_ends_without_a_word(death: Death) -> None:
    assert decide(death, None, 0, 3) == Decision(restart=False)


@pytest.mark.parametrize("now", [Progress(0, 2, 4), Progress(0, 4, 1), Progress(1, 0, 0)])
def test_progress_since_the_death_before_is_followed_by_a_restart(now: Progress) -> None:
    assert decide(killed(progress=now), Progress(0, 2, 3), 1, 3).restart


@pytest.mark.parametrize("now", [Progress(0, 2, 3), Progress(0, 2, 2), Progress(0, 2, 0)])
def test_no_progress_since_the_death_before_gives_up(now: Progress) -> None:
    decision = decide(killed(progress=now), Progress(0, 2, 3), 1, 3)
    assert not decision.restart
    for part in ("no progress", "step 3", "save_steps=500", "more often", "memory"):
        assert part in decision.reason


def test_steps_without_a_checkpoint_are_no_progress() -> None:
    decision = decide(killed(progress=Progress(0, 0, 90)), Progress(0, 0, 70), 1, 3)
    assert not decision.restart
    assert "no checkpoint" in decision.reason


def test_restarts_come_to_an_end() -> None:
    decision = decide(killed(progress=Progress(0, 9, 9)), Progress(0, 2, 3), 3, 3)
    assert not decision.restart
    assert "--max-restarts 3" in decision.reason


def test_a_death_says_what_happened_and_how_far_it_came() -> None:
    assert killed().cause == "killed by SIGKILL (the host's OOM killer, if nobody sent it)"
    assert killed(returncode=-11).cause == "killed by SIGSEGV"
    assert killed().place == (
        "after step 3 of the training in out; the last whole checkpoint is checkpoint-2"
    )


def test_a_script_that_was_killed_ends_with_the_weights_of_its_twin(
    tmp_path: Path, twin: dict[str, torch.Tensor]
) -> None:
    status, out, err, summary = run(tmp_path, SCRIPT, "kill", "5")
    assert status == 0, err
    assert out.endswith("the script's last line\n")
    assert tiny.largest_difference(torch.load(tmp_path / "weights.pt"), twin) == 0
    (death,) = summary["deaths"]
    assert (summary["status"], summary["restarts"], death["returncode"]) == ("finished", 1, -9)
    assert death["progress"] == {"finished": 0, "checkpoint": 4, "step": 5}
    assert "checkpoint-4. Restarting (1 of 3)" in err
    assert summary["reports"] == [str(tmp_path / "out" / "oomguard.json")]


def test_sigterm_is_passed_on_and_ends_in_a_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path, SCRIPT, "wait", "4")
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, _, err, summary = finish(process)
    assert (status, summary["status"], summary["restarts"]) == (143, "stopped", 0)
    assert (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").exists()
    assert "checkpoint-5. `oomguard run --resume` goes on from there" in err


@pytest.mark.slow
def test_a_bug_that_comes_back_at_the_same_step_ends_after_one_retry(tmp_path: Path) -> None:
    status, _, err, summary = run(tmp_path, SCRIPT, "crash", "5")
    assert (status, summary["restarts"]) == (1, 1)
    assert [death["error"] for death in summary["deaths"]] == ["RuntimeError: a bug"] * 2
    assert "Giving up: no progress since the death before, which was at step 5" in err


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
def test_a_script_killed_at_any_moment_ends_with_the_weights_of_its_twin(
    moment: int, tmp_path: Path, twin: dict[str, torch.Tensor]
) -> None:
    status, _, err, summary = run(tmp_path, SCRIPT, "later", str(0.05 + moment * 0.06))
    assert status == 0, err
    assert tiny.largest_difference(torch.load(tmp_path / "weights.pt"), twin) == 0
    assert summary["restarts"] <= 1


KILLS_ITSELF = """
import os, sys
print("begun", flush=True)
os.kill(os.getpid(), int(sys.argv[1]))
"""


def test_a_script_without_a_training_is_restarted_once(tmp_path: Path) -> None:
    status, out, err, summary = run(tmp_path, KILLS_ITSELF, "9")
    assert (status, out) == (137, "begun\nbegun\n")
    assert (summary["status"], summary["exit_status"], summary["restarts"]) == ("failed", 137, 1)
    assert "killed by SIGKILL" in err
    assert "before any training began. Giving up: no checkpoint between two deaths" in err


def test_max_restarts_0_never_restarts(tmp_path: Path) -> None:
    status, out, err, _ = run(tmp_path, KILLS_ITSELF, "11", options=("--max-restarts", "0"))
    assert (status, out) == (139, "begun\n")
    assert "--max-restarts 0 is used up" in err


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import sys; sys.exit('no data')", 1, "no data"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("if", 1, "SyntaxError"),
        ("import argparse as a; a.ArgumentParser().parse_args(['--x'])", 2, "unrecognized"),
        ("import os; os.kill(os.getpid(), 15)", 143, ""),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_what_is_final_ends_at_once_with_the_scripts_exit_status(
    text: str, status: int, said: str, tmp_path: Path
) -> None:
    found, _, err, summary = run(tmp_path, text)
    assert (found, summary["exit_status"], summary["restarts"]) == (status, status, 0)
    assert said in err
    assert "Restarting" not in err


def test_a_script_that_finishes_says_nothing_of_ours(tmp_path: Path) -> None:
    status, out, err, summary = run(tmp_path, "print('hello')")
    assert (status, out, summary["status"], summary["deaths"]) == (0, "hello\n", "finished", [])
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_of_a_training_does_what_it_does_to_the_script(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    process = start(tmp_path, "import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    found, _, _, summary = finish(process)
    assert (found, summary["status"], len(summary["deaths"])) == (status, "stopped", 1)
