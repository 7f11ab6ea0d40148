"""The figure of the report: what is drawn, and what Plotly thinks of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from oomguard.report.run import Run
from oomguard.report.timeline import DARK, LIGHT, figure, painted
from oomguard.watch.readings import Reading
from tests.runs import GIB, LEAK, MIB, readings, report_of, write_run

if TYPE_CHECKING:
    from pathlib import Path


def traces(run: Run) -> dict[str, dict[str, Any]]:
    return {trace["name"]: trace for trace in figure(run)["data"]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.read(write_run(tmp_path / "llama"))


def test_lines_and_marks_are_all_there(run: Run) -> None:
    assert set(traces(run)) == {
        *("allocated, peak", "allocated after the step", "reserved, peak", "card"),
        *("recovery", "evaluation", "save", "growth"),
    }


def test_lines_are_of_the_steps_and_marks_of_the_rest(run: Run) -> None:
    found = traces(run)
    assert found["allocated, peak"]["x"] == list(range(1, 41))
    assert found["allocated, peak"]["y"][0] == pytest.approx(11, abs=1e-3)
    assert found["card"]["y"] == [12, 12]
    assert found["evaluation"]["x"] == found["save"]["x"] == [10, 20, 30, 40]
    assert found["evaluation"]["y"] == [6] * 4


def test_recoveries_of_one_step_are_one_mark_that_tells_all_of_them(run: Run) -> None:
    mark = traces(run)["recovery"]
    assert (mark["x"], mark["y"]) == ([12], [12])
    assert mark["text"][0].split("<br>") == [
        "backward, asked 1.50 GiB: CheckpointActivations, gradient_checkpointing off -&gt; on",
        "backward, asked 1.50 GiB: SplitBatch, 8 x 4 -&gt; 4 x 8 passes",
    ]


def test_growth_is_a_line_from_where_it_began_at_its_rate(run: Run) -> None:
    line = traces(run)["growth"]
    assert line["x"] == [20, 40]
    assert line["y"][1] - line["y"][0] == pytest.approx(20 * 2 / 1024, abs=1e-3)


def test_what_was_taken_back_or_has_no_rate_is_not_drawn(run: Run) -> None:
    for finding in (replace(LEAK, withdrawn=True), replace(LEAK, bytes_per_step=None)):
        assert "growth" not in traces(replace(run, findings=(finding,)))


def test_what_grows_beside_the_tensors_is_no_line_on_theirs(run: Run) -> None:
    for finding in (replace(LEAK, kind="outside"), replace(LEAK, kind="neighbour")):
        assert "growth" not in traces(replace(run, findings=(finding,)))
    assert "growth" in traces(replace(run, findings=(replace(LEAK, kind="cycles"),)))


def test_growth_since_a_step_after_the_last_reading_is_not_drawn(run: Run) -> None:
    assert "growth" not in traces(replace(run, findings=(replace(LEAK, since_step=99),)))


def test_a_peak_known_only_where_it_rose_is_the_highest_so_far(run: Run) -> None:
    known = {1: 5 * GIB, 4: 6 * GIB}
    rows = tuple(
        row._replace(peak_allocated_bytes=known.get(row.step), peak_reserved_bytes=None)
        for row in readings(5)
    )
    found = traces(replace(run, readings=rows))
    assert found["allocated, peak so far"]["y"] == [5, 5, 5, 6, 6]
    assert "reserved, peak" not in found


def test_without_a_device_the_memory_of_the_host_is_drawn(tmp_path: Path) -> None:
    rows = [Reading(step=n, time_s=n, host_rss_bytes=300 * MIB) for n in range(3)]
    run = replace(Run.of(report_of(recoveries=[])), readings=tuple(rows))
    (line,) = figure(run)["data"]
    assert (line["name"], line["visible"], line["y"]) == ("host memory", True, [300.0] * 3)


def test_what_few_ask_for_is_hidden_at_first(run: Run) -> None:
    rows = tuple(row._replace(device_used_bytes=12 * GIB) for row in run.readings)
    found = traces(replace(run, readings=rows))
    assert found["used on the card by all"]["visible"] is False
    assert found["allocated, peak"]["visible"] is True


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_plotly_knows_every_property_and_colour(run: Run, palette: dict[str, str]) -> None:
    objects = pytest.importorskip("plotly.graph_objects")
    drawn = objects.Figure(painted(figure(run), palette))  # raises for what it does not know
    assert len(drawn.data) == 8


def contrast(one: str, other: str) -> float:
    """As in WCAG 2.2: relative luminances, 1 to 21."""

    def luminance(color: str) -> float:
        channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
@pytest.mark.parametrize("ground", ["page", "surface"])
def test_text_and_lines_stand_out_as_wcag_asks(palette: dict[str, str], ground: str) -> None:
    for name in ("text", "muted", "accent", "warning"):
        assert contrast(palette[name], palette[ground]) >= 4.5, name
    assert contrast(palette["second"], palette[ground]) >= 3
