"""The HTML report in a real browser: drawn, marked, quiet, and alone."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from oomguard.report.page import page
from oomguard.report.run import Run
from oomguard.report.timeline import DARK, LIGHT
from tests.browser import needs_chromium, on_a_phone, opened, told, with_script
from tests.runs import write_run
from tests.test_page import hostile_run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_chromium
DARK_FLAGS = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("plotly")
    return page(Run.read(write_run(tmp_path_factory.mktemp("runs") / "llama-lora")))


def write(folder: Path, text: str) -> Path:
    path = folder / "page.html"
    path.write_text(text, "utf-8")
    return path


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize(("palette", "flags"), [(LIGHT, ()), (DARK, DARK_FLAGS)])
def test_the_timeline_is_drawn_with_its_marks_and_nothing_is_complained_of_or_asked_for(
    tmp_path: Path, html: str, palette: dict[str, str], flags: tuple[str, ...]
) -> None:
    seen = opened(write(tmp_path, html), *flags)
    assert seen.console == []
    assert seen.asked == []
    lines = re.findall(r'class="js-line"[^>]*stroke: (rgb\([^)]*\))', seen.dom)
    assert lines.count(rgb(palette["accent"])) == 2  # the peak, and what is left after the step
    assert lines.count(rgb(palette["warning"])) == 2  # the card, and the growth
    points = re.findall(r'<path class="point"[^>]*fill: (rgb\([^)]*\))', seen.dom)
    assert points.count(rgb(palette["muted"])) == 8  # four evaluations and four saves
    assert points.count(rgb(palette["warning"])) == 3  # the recovery, both ends of the growth
    buttons = re.findall(r'data-title="([^"]*)"', seen.dom)
    assert "Zoom in" in buttons
    # Plotly's own default would offer to upload the figure.
    assert not [name for name in buttons if re.search("share|cloud|edit", name, re.IGNORECASE)]


def test_what_would_be_asked_for_and_complained_of_is_seen(tmp_path: Path) -> None:
    text = "<!doctype html><img src='https://example.org/x.png'><script>undefined.x</script>"
    seen = opened(write(tmp_path, text))
    assert seen.asked == ["https://example.org/x.png"]
    assert any("Uncaught TypeError" in message for message in seen.console)


def test_the_policy_refuses_what_the_page_has_no_business_to_do(tmp_path: Path, html: str) -> None:
    strange = "<script>document.title = 'ran'</script><img src='https://example.org/x.png'></body>"
    seen = opened(write(tmp_path, html.replace("</body>", strange)))
    assert "<title>ran" not in seen.dom
    assert seen.asked == []


def test_a_click_on_a_name_hides_its_line_and_another_shows_it(tmp_path: Path, html: str) -> None:
    script = """
    setTimeout(async () => {
      const lines = () => document.querySelectorAll("#timeline .js-line").length;
      const button = [...document.querySelectorAll("#legend button")]
        .find((entry) => entry.textContent === "card");
      const seen = [lines()];
      for (let i = 0; i < 2; i += 1) {
        button.click();
        await new Promise((done) => setTimeout(done, 300));
        seen.push(lines(), button.getAttribute("aria-pressed"));
      }
      document.body.dataset.seen = JSON.stringify(seen);
    }, 500);
    """
    seen = opened(write(tmp_path, with_script(html, script)))
    count = json.loads(told(seen))[0]
    assert json.loads(told(seen)) == [count, count - 1, "false", count, "true"]


def test_hovering_tells_the_step_and_zooming_moves_the_axis(tmp_path: Path, html: str) -> None:
    script = """
    setTimeout(async () => {
      Plotly.Fx.hover("timeline", { xval: 12 });
      const hover = document.querySelector("#timeline .hoverlayer").textContent;
      document.querySelector('[data-title="Zoom in"]').click();
      await new Promise((done) => setTimeout(done, 1000));
      const range = document.getElementById("timeline").layout.xaxis.range;
      document.body.dataset.seen = JSON.stringify([hover, range[1] - range[0]]);
    }, 500);
    """
    hover, width = json.loads(told(opened(write(tmp_path, with_script(html, script)))))
    assert hover.startswith("step 12")
    assert "allocated, peak : 11.51 GiB, 18.0 s into the run" in hover
    assert "recovery : backward, asked 1.50 GiB: CheckpointActivations" in hover
    assert width < 25


def test_on_a_phone_nothing_is_wider_than_the_screen(tmp_path: Path, html: str) -> None:
    # The sections clip nothing, so whatever sticks out of them widens the document.
    script = """JSON.stringify([
      inner.documentElement.scrollWidth,
      inner.querySelector("#timeline .main-svg").clientWidth,
      Math.max(...[...inner.querySelectorAll("table")].map((table) => table.scrollWidth)),
    ])"""
    bare = with_script(html, "")
    page_width, plot, table = json.loads(told(opened(write(tmp_path, on_a_phone(bare, script)))))
    assert page_width == 390
    assert 300 < plot <= 390
    assert table <= 390


def test_no_name_of_a_run_becomes_code_even_without_the_policy(tmp_path: Path) -> None:
    strange = (
        "</script><script>document.title='ran'</script><img src=x onerror=document.title='ran'>"
    )
    text = page(Run.read(hostile_run(tmp_path / "run", strange)))
    script = """
    setTimeout(() => {
      Plotly.Fx.hover("timeline", { xval: 12 });
      document.body.dataset.seen = document.title + document.querySelectorAll("img").length
        + document.querySelector("#timeline .hoverlayer").textContent.includes("<script>");
    }, 500);
    """
    seen = opened(write(tmp_path, with_script(text, script)))
    assert told(seen) == "run: oomguard report0true"
    assert seen.asked == []
