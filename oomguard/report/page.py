"""The report as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from oomguard.errors import ConfigurationError
from oomguard.report import sections
from oomguard.report.memory import memory, memory_line
from oomguard.report.next_run import snippet
from oomguard.report.prediction import prediction
from oomguard.report.table import headline, summary
from oomguard.report.timeline import DARK, LIGHT, figure

if TYPE_CHECKING:
    from oomguard.report.record import Report
    from oomguard.report.run import Run


def page(run: Run) -> str:
    """The whole report.

    Raises:
        ConfigurationError: There are readings to draw and Plotly is missing.
    """
    drawn = figure(run) if run.readings else None
    scripts = [_resource("page.js")]
    if drawn is not None:
        scripts.insert(0, plotly_js())
    return (
        _templates()
        .get_template("page.html")
        .render(
            overview=sections.overview(run),
            memory=memory(run),
            figure=None if drawn is None else _in_script(drawn),
            ladder=None if run.report is None else _ladder(run.report),
            plan=None if run.report is None else _plan(run.report),
            growth=sections.growth(run),
            prediction=prediction(run),
            environment=sections.environment(run),
            notes=run.unreadable,
            style=Markup(_style()),  # noqa: S704 - our own file
            scripts=[Markup(text) for text in scripts],  # noqa: S704 - our own file and Plotly's
            policy=_policy(scripts),
        )
    )


def _ladder(report: Report) -> dict[str, Any]:
    return {
        "headline": headline(report).removeprefix("oomguard: "),
        "recoveries": sections.recoveries(report),
        "rungs": sections.rungs(report),
    }


def _plan(report: Report) -> dict[str, Any]:
    return {
        "settings": sections.settings(report),
        "snippet": snippet(report.plan, report.initial_plan),
        "note": 'oomguard.fit(trainer, plan="last") begins a run in the same output_dir on '
        "exactly this plan, whatever the configuration says.",
    }


def for_notebook(report: Report, run: Run) -> str:
    """The headline, a line of the memory, and the recoveries: a few kB, without scripts."""
    return (
        _templates()
        .get_template("notebook.html")
        .render(
            headline=headline(report),
            sparkline=memory_line(run, width=60),
            recoveries=sections.recoveries(report),
            summary=summary(report),
        )
    )


def plotly_js() -> str:
    """The bundle of plotly.js that comes with the Plotly package.

    Raises:
        ConfigurationError: Plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        msg = (
            "The timeline is drawn with Plotly, which is not installed: "
            "pip install 'oomguard[report]' (or plotly)."
        )
        raise ConfigurationError(msg) from error
    text: str = get_plotlyjs()
    return text


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("oomguard.report"),
        autoescape=True,  # every text of the user's run is escaped, without being asked to
        undefined=StrictUndefined,
    )


def _resource(name: str) -> str:
    return (files("oomguard.report") / "templates" / name).read_text(encoding="utf-8")


def _style() -> str:
    """The style sheet, with the colours of the figure as variables."""

    def variables(palette: dict[str, str]) -> str:
        return " ".join(f"--{name}: {color};" for name, color in palette.items())

    return (
        f":root {{ color-scheme: light dark; {variables(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}\n"
        f"{_resource('page.css')}"
    )


def _policy(scripts: list[str]) -> str:
    """What a browser may do with the page: run these very scripts, and fetch nothing."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in scripts)
    allowed = " ".join(f"'sha256-{digest.decode()}'" for digest in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _in_script(value: dict[str, Any]) -> Markup:
    """JSON in which nothing can end the element that it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - what is left of markup was escaped above
