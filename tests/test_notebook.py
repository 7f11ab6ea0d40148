"""A report in the cells of a notebook: shown once in each."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path

import pytest

from oomguard.report import Report, notebook
from tests.runs import report_of

# A process of its own: IPython makes itself at home. rich and oomguard know a notebook by the name
# of its shell. This one keeps what it would send to a browser: what is displayed, and last lines.
SCRIPT = """
import sys
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell


class Values(DisplayHook):
    def write_output_prompt(self): pass
    def write_format_data(self, data, metadata=None): values.append(data)


class ZMQInteractiveShell(InteractiveShell):
    displayhook_class = Values
    display_pub_class = CapturingDisplayPublisher


def shown(code):
    shell.display_pub.outputs.clear(), values.clear()
    shell.run_cell(code, store_history=True).raise_error()
    told = [output["data"].get("text/html", "") for output in shell.display_pub.outputs]
    return [html for html in told if "oomguard" in html], list(values)


values, shell = [], ZMQInteractiveShell.instance()
shown("import oomguard; from pathlib import Path; from tests import tiny")
shown(f"trainer = tiny.sft_trainer(Path({sys.argv[1]!r}), max_steps=1)")

displayed, last = shown("oomguard.fit(trainer)")
assert len(displayed) == 1 and "no out-of-memory error" in displayed[0], displayed
assert last == [], last

displayed, last = shown("report = oomguard.fit(trainer)")
assert len(displayed) == 1, displayed

for _ in range(2):  # of another cell
    displayed, last = shown("report")
    assert len(displayed) == 1, displayed
    assert last == [], last
"""


class ZMQInteractiveShell:
    """By its name a notebook, with the number of the cell that runs."""

    execution_count = 1


def test_a_report_is_not_shown_again_as_the_last_line_of_its_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell, shown = ZMQInteractiveShell(), list[str]()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(notebook, "display", shown.append)
    report: Report = report_of()
    report.show()
    report._ipython_display_()
    assert shown == [report._repr_html_()]
    shell.execution_count += 1
    report._ipython_display_()
    report._ipython_display_()
    assert len(shown) == 3
    assert "_shown_in" not in report.to_dict()


def test_outside_of_terminals_and_notebooks_nothing_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report_of().show()
    assert capsys.readouterr().out == ""
    assert notebook.cell() is None


@pytest.mark.slow
def test_a_cell_that_trains_shows_the_report_once_and_one_that_asks_for_it_too(
    tmp_path: Path,
) -> None:
    pytest.importorskip("IPython", reason="IPython runs the cells: pip install ipython")
    run = subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
