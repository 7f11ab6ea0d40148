"""The command line: what it takes, and what it refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import oomguard
from oomguard.cli import app
from tests.test_under_guard import output, write
from tests.tiny import needs_fused_head

if TYPE_CHECKING:
    from pathlib import Path


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env=environment)


def test_the_version_is_printed() -> None:
    assert invoke("--version").output == f"oomguard {oomguard.__version__}\n"


def test_the_supervisor_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write(
        tmp_path / "asks.py",
        """
        import sys, oomguard.cli, oomguard.supervise
        print({"torch", "transformers", "numpy"} & set(sys.modules))
        """,
    )
    assert output(tmp_path, "asks.py")[1] == "set()\n"


def test_a_script_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = invoke("run", str(tmp_path / "nothing.py"))
    assert done.exit_code == 2
    assert "name a script" in done.output


@pytest.mark.parametrize("options", [("--ladder", "steep"), ("--max-restarts", "-1"), ("--no",)])
def test_an_option_that_cannot_work_is_refused(options: tuple[str, ...]) -> None:
    done = invoke("run", *options, __file__)
    assert done.exit_code == 2


def test_one_of_several_processes_is_refused() -> None:
    done = invoke("run", __file__, WORLD_SIZE="4", COLUMNS="400")
    assert done.exit_code == 2
    assert "WORLD_SIZE is 4" in done.output


def test_doctor_prints_json_and_nothing_else() -> None:
    done = invoke("doctor", "--json")
    values = json.loads(done.stdout)
    assert (done.exit_code, values["healthy"]) == (0, True)


def test_doctor_prints_tables() -> None:
    done = invoke("doctor", COLUMNS="160")
    assert done.exit_code == 0
    for part in ("transformers", "SplitBatch", "allocator settings"):
        assert part in done.stdout


TRAINS = """
    import sys
    from pathlib import Path
    from tests.setups import load, sft
    print("made", sys.argv[1:])
    try:
        sft(Path(sys.argv[1]), load(attn_implementation="eager")).train()
    except Exception:
        print("not caught by this")
    print("not reached")
"""


@needs_fused_head
def test_diagnose_runs_a_script_up_to_its_training(tmp_path: Path) -> None:
    write(tmp_path / "trains.py", TRAINS)
    done = output(tmp_path, "-m", "oomguard", "diagnose", "trains.py", "there", "--json")
    assert (done[0], "eager_attention" in done[1], "made" in done[1]) == (0, True, False), done
    assert "made ['there', '--json']" in done[2]
    assert "not" not in done[2].split("made")[1].split("\n")[1:]
    done = output(tmp_path, "-m", "oomguard", "diagnose", "--json", "-m", "trains", "there")
    found = json.loads(done[1])
    assert (done[0], [each["name"] for each in found["findings"]]) == (0, ["eager_attention"])
    assert not [path for path in tmp_path.glob("there/*") if path.name.startswith("checkpoint")]


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("import transformers", 1, "ended without a call of Trainer.train()"),
        ("import sys; sys.exit(0)", 1, "ended without a call of Trainer.train()"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import nothing_of_that_name", 1, "ModuleNotFoundError"),
    ],
)
def test_diagnose_says_that_a_script_trains_nothing(
    text: str, status: int, said: str, tmp_path: Path
) -> None:
    write(tmp_path / "ends.py", text)
    done = output(tmp_path, "-m", "oomguard", "diagnose", "ends.py")
    assert (done[0], done[1]) == (status, "")
    assert said in done[2]
    assert "oomguard/" not in done[2], "the traceback begins in the script"
