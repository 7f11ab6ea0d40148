"""A script under the guard runs as Python would run it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from typing import TYPE_CHECKING

import pytest

from oomguard.errors import ConfigurationError, LadderExhaustedError
from oomguard.under_guard import kind_of
from tests.test_supervise import ENVIRONMENT

if TYPE_CHECKING:
    from pathlib import Path

SHOWS = """
    import sys
    print(__name__, __file__, sys.argv)
    print(sys.path[0], sys.modules["__main__"].__dict__ is globals())
    import beside
"""
LOADED = """
    import sys
    print(sorted({"torch", "transformers", "numpy", "rich", "typer"} & set(sys.modules)))
"""


def output(folder: Path, *command: str) -> tuple[int, str, str]:
    done = subprocess.run(  # noqa: S603 - it is our own script
        [sys.executable, *command],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")


@pytest.mark.parametrize(
    "command",
    [
        ("sub/script.py", "a", "--json"),
        ("./sub/script.py", "-m", "--", "x"),
        ("-m", "sub.script", "a"),
        ("sub/script", "a"),
    ],
)
def test_name_path_and_arguments_are_those_of_python(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    text = textwrap.dedent(SHOWS)
    write(tmp_path / "sub" / "script.py", text)
    write(tmp_path / "sub" / "beside.py", "print('beside')")
    write(tmp_path / "beside.py", "print('beside the working directory')")
    write(tmp_path / "sub" / "script", text)
    expected = output(tmp_path, *command)
    assert expected[0] == 0, expected
    found = output(tmp_path, "-m", "oomguard", "run", *command)
    assert found[0] == 0, found
    assert found[1:] == expected[1:]


def test_a_zip_file_runs(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.zip", "w") as file:
        file.writestr("__main__.py", "import sys, beside; print(sys.argv)")
        file.writestr("beside.py", "print('in the zip file')")
    found = output(tmp_path, "-m", "oomguard", "run", "script.zip", "a")
    assert found == (0, "in the zip file\n['script.zip', 'a']\n", "")


def test_nothing_is_imported_before_the_script_does(tmp_path: Path) -> None:
    write(tmp_path / "script.py", LOADED)
    assert output(tmp_path, "-m", "oomguard", "run", "script.py")[1] == "[]\n"


def test_a_traceback_is_that_of_the_script(tmp_path: Path) -> None:
    write(tmp_path / "script.py", "def f():\n    1 / 0\nf()\n")
    expected = output(tmp_path, str(tmp_path / "script.py"))
    found = output(tmp_path, "-m", "oomguard", "run", "script.py")
    assert found == expected
    assert "ZeroDivisionError" in found[2]


def test_an_excepthook_of_the_scripts_own_is_called(tmp_path: Path) -> None:
    write(
        tmp_path / "script.py",
        "import sys\nsys.excepthook = lambda kind, e, trace: print('hook', e)\nraise ValueError(7)",
    )
    assert output(tmp_path, "-m", "oomguard", "run", "script.py") == (1, "hook 7\n", "")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LadderExhaustedError("spent"), "final"),
        (ConfigurationError("empty"), "final"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crash"),
        (ValueError("x"), "crash"),
    ],
)
def test_an_error_is_judged_by_what_a_restart_can_do(error: Exception, kind: str) -> None:
    # The text alone does not make a lost GPU: the device is asked, and there is none here.
    assert kind_of(error) == kind
