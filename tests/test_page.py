"""The HTML report as text: what it says, and that nothing of a run can be more than text in it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomguard.errors import ConfigurationError
from oomguard.report import Report
from oomguard.report.page import _in_script, page
from oomguard.report.run import Run
from tests.runs import GIB, LEAK, PLAN, readings, report_of, write_run

if TYPE_CHECKING:
    from pathlib import Path

HOSTILE = """</script><script>alert(1)</script><img src=x onerror='alert(1)'>"&amp;{{7*7}}"""
_LOADS = {"src", "href", "srcset", "action", "data", "poster", "formaction", "background"}


class Page(HTMLParser):
    """The text, the scripts and the attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.opened: list[str] = []
        self.texts: list[str] = []
        self._within = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        self._within = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts[-1] += data
        elif self._within != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def hostile_run(folder: Path, text: str = HOSTILE) -> Path:
    """A run all of whose names are `text`."""
    plan = replace(PLAN, target_modules=(text,), optim=text)
    report = report_of(plan, status="failed", error=text, ladder=(text,), versions={text: text})
    report.recoveries = [
        replace(row, rung=text, change=text, event=replace(row.event, phase=text, message=text))
        for row in report.recoveries
    ]
    report.estimate = {
        "peak_allocated_bytes": 9 * GIB,
        "breakdown": {text: GIB},
        "plan": plan.to_dict(),
    }
    finding = replace(LEAK, message=text, holder=text, advice=text, phase=text, stacks=(text,))
    return write_run(folder, report=report, findings=[finding], device=text)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(page(Run.read(write_run(tmp_path_factory.mktemp("runs") / "llama-lora"))))


def test_the_page_tells_what_happened(shown: Page) -> None:
    for part in (
        *("llama-lora finished", "Recoveries 2", "Time lost 1.0 s", "Effective batch 32 unchanged"),
        *("Peak allocated 11.51 GiB of 12.00 GiB on the card", "2 recoveries, effective batch 32"),
        *(
            "12 backward 8 x 2048 1.50 GiB 512.00 MiB CheckpointActivations exact",
            "HalveSequence -",
        ),
        *("Findings 1 leak", "Leak Allocated memory grows", "What to do: Keep loss.item()"),
        *("NVIDIA Test Card", "torch"),
        *("training 11.51 GiB 12 12.01 GiB", "evaluation 6.00 GiB 10", "optimizer 512.00 MiB"),
    ):
        assert part in shown.text, part


def test_the_snippet_for_the_next_run_stands_in_the_page(shown: Page) -> None:
    assert "per_device_train_batch_size=4, gradient_accumulation_steps=8," in shown.text


def test_nothing_is_loaded_from_anywhere(shown: Page) -> None:
    loaded = [attribute for attribute in shown.attributes if attribute[1] in _LOADS]
    assert loaded == [("link", "href", "data:,")]
    assert not {"iframe", "object", "embed", "form", "base"} & set(shown.opened)


def test_the_policy_lets_a_browser_run_these_scripts_and_fetch_nothing(shown: Page) -> None:
    (policy,) = (value for _, name, value in shown.attributes if value.startswith("default-src"))
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    _, *code = sorted(shown.scripts, key=lambda script: not script.startswith("{"))
    digests = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code}
    assert set(re.findall(r"sha256-([^']+)", rules["script-src"])) == digests
    assert len(digests) == 2


def test_sections_are_named_and_tables_captioned(shown: Page) -> None:
    assert shown.opened.count("h1") == 1
    labels = {value for tag, name, value in shown.attributes if name == "aria-labelledby"}
    ids = {value for _, name, value in shown.attributes if name == "id"}
    assert labels <= ids
    assert len(labels) == shown.opened.count("section") == shown.opened.count("h2")
    assert shown.opened.count("caption") == shown.opened.count("table")
    assert ("html", "lang", "en") in shown.attributes
    assert any(name == "name" and value == "viewport" for _, name, value in shown.attributes)


def test_every_text_of_the_run_is_text_in_the_page(tmp_path: Path) -> None:
    found = Page(page(Run.read(hostile_run(tmp_path / "hostile run"))))
    assert len(found.scripts) == 3
    assert "img" not in found.opened
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert HOSTILE in "".join(found.texts)
    assert found.text.count("{{7*7}}") > 8
    json.loads(next(script for script in found.scripts if script.startswith("{")))


def test_nothing_in_the_figure_can_end_the_element_that_holds_it() -> None:
    text = _in_script({"text": HOSTILE + "<!-- <script"})
    assert not {"<", ">", "&"} & set(text)
    assert json.loads(text) == {"text": HOSTILE + "<!-- <script"}


@settings(max_examples=10, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12))
def test_any_text_of_the_run_leaves_the_page_its_form(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    found = Page(page(Run.read(hostile_run(folder / "run", text))))
    assert found.opened.count("section") == 7
    assert len(found.scripts) == 3


def test_a_notebook_gets_a_small_table_without_scripts(tmp_path: Path) -> None:
    report = Report.load(write_run(tmp_path / "run") / "oomguard.json")
    html = report._repr_html_()
    assert len(html) < 8192
    found = Page(html)
    assert "script" not in found.opened
    for part in ("2 recoveries", "CheckpointActivations", "█▅", "peak 11.51 GiB of 12.00 GiB"):
        assert part in found.text
    hostile = Report.load(hostile_run(tmp_path / "hostile") / "oomguard.json")
    assert "img" not in Page(hostile._repr_html_()).opened


def test_a_run_that_met_nothing_and_was_not_watched_has_a_page_too(tmp_path: Path) -> None:
    report = report_of(recoveries=[], plan=PLAN)
    folder = write_run(tmp_path / "calm", report=report, rows=(), findings=None)
    found = Page(page(Run.read(folder)))
    for part in ("no out-of-memory error", "No readings of memory", "Not watched."):
        assert part in found.text
    assert len(found.scripts) == 1  # Plotly has nothing to draw


def test_a_report_that_was_never_saved_has_a_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    html = report_of().to_html(path)
    assert "<h1>oomguard run" in html
    assert path.read_text("utf-8") == html


def test_watched_and_quiet_is_not_the_same_as_not_watched(tmp_path: Path) -> None:
    found = Page(page(Run.read(write_run(tmp_path / "quiet", findings=[]))))
    assert "Watched, and nothing was found." in found.text


def test_what_was_taken_back_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", findings=[replace(LEAK, withdrawn=True)])
    text = Page(page(Run.read(folder))).text
    assert "Leak (taken back)" in text
    assert "Findings 1" not in text


def test_advice_that_the_message_gives_is_not_given_twice(tmp_path: Path) -> None:
    advice = "keep loss.item()"
    finding = replace(LEAK, message=f"It grows. What to do: {advice}.", advice=advice)
    folder = write_run(tmp_path / "run", findings=[finding])
    assert Page(page(Run.read(folder))).text.count(advice) == 1


@pytest.mark.parametrize("name", ["oomguard_vram.parquet", "oomguard_findings.json"])
def test_a_broken_file_beside_the_report_costs_its_part_only(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(b"PAR1 half of a")
    run = Run.read(folder)
    assert [name in why for why in run.unreadable] == [True]
    assert name in Page(page(run)).text


def test_files_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    hour_ago = time.time() - 3600
    for name in ("oomguard_vram.parquet", "oomguard_findings.json"):
        os.utime(folder / name, (hour_ago, hour_ago))
    run = Run.read(folder)
    assert (run.readings, run.findings) == ((), None)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"schema": "other"}'])
def test_a_folder_without_a_whole_report_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "oomguard.json").write_text(content)
    with pytest.raises(ConfigurationError, match=re.escape("oomguard.json")):
        Run.read(tmp_path)


def estimated(report: Report, **values: Any) -> Report:
    known = {"peak_allocated_bytes": 8 * GIB, "plan": report.plan.to_dict(), **values}
    return replace(report, estimate=known)


def test_a_prediction_is_compared_with_the_steps_made_under_its_plan(tmp_path: Path) -> None:
    # The highest peak is 11 GiB and 11 MiB before step 12, 7 GiB and 40 MiB after it. Step 12
    # itself, which ran under both plans, has the highest of all.
    after = estimated(report_of(), breakdown={"saved_activations": 3 * GIB, "weights": GIB})
    text = Page(page(Run.read(write_run(tmp_path / "after", report=after)))).text
    assert "peak allocated 8.00 GiB 7.04 GiB +13.7%" in text
    assert "saved activations 3.00 GiB weights 1024.00 MiB" in text
    before = estimated(report_of(), plan=PLAN.to_dict())
    text = Page(page(Run.read(write_run(tmp_path / "before", report=before)))).text
    assert "peak allocated 8.00 GiB 11.01 GiB -27.3%" in text
    assert "steps made under the plan that was estimated" in text
    # A run that began with the plan of an earlier one, and kept it.
    begun = estimated(report_of(recoveries=[]))
    assert begun.plan != begun.initial_plan
    text = Page(page(Run.read(write_run(tmp_path / "begun", report=begun)))).text
    assert "peak allocated 8.00 GiB 11.51 GiB -30.5%" in text


def test_a_reading_merged_of_steps_under_two_plans_is_left_out(tmp_path: Path) -> None:
    # Each reading is of two steps. That of step 14 is of step 13 too, which ran out of memory.
    rows = [
        row._replace(step=2 * row.step, peak_allocated_bytes=(9 if row.step == 7 else 6) * GIB)
        for row in readings()
    ]
    late = [replace(row, event=replace(row.event, step=13)) for row in report_of().recoveries]
    report = estimated(report_of(recoveries=late))
    text = Page(page(Run.read(write_run(tmp_path / "run", report=report, rows=rows)))).text
    assert "peak allocated 8.00 GiB 6.00 GiB +33.3%" in text


def test_a_prediction_for_a_plan_that_never_ran_is_shown_without_a_measurement(
    tmp_path: Path,
) -> None:
    report = estimated(report_of(), plan=replace(PLAN, max_length=64).to_dict())
    text = Page(page(Run.read(write_run(tmp_path / "run", report=report)))).text
    assert "peak allocated 8.00 GiB - -" in text
    assert "No training step was measured" in text


@pytest.mark.parametrize("plan", [None, {}, {"per_device_train_batch_size": 0}, {"other": 1}])
def test_a_prediction_of_an_unknown_plan_is_compared_with_all_steps(
    tmp_path: Path, plan: Any
) -> None:
    report = estimated(report_of(), plan=plan, breakdown=None, peak_reserved_bytes="many")
    text = Page(page(Run.read(write_run(tmp_path / "run", report=report)))).text
    assert "peak allocated 8.00 GiB 11.51 GiB -30.5%" in text
    assert "whatever plan they ran under" in text
