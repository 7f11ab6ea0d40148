"""Memory over the steps as a Plotly figure, in JSON types; colours are names of CSS variables."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from oomguard.memory.size import format_bytes
from oomguard.report.table import changed, taken
from oomguard.report.view import duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from oomguard.report.record import Recovery
    from oomguard.report.run import Run

LIGHT = {
    "page": "#f6f7f9",
    "surface": "#ffffff",
    "text": "#1b2230",
    "muted": "#5b6576",
    "line": "#e2e6ec",
    "accent": "#2459d6",
    "accent-fill": "rgba(36, 89, 214, 0.12)",
    "second": "#7b8698",
    "warning": "#b4430c",
}
DARK = {
    "page": "#0f131a",
    "surface": "#171c26",
    "text": "#e7ebf2",
    "muted": "#9aa5b8",
    "line": "#2a3240",
    "accent": "#82aaff",
    "accent-fill": "rgba(130, 170, 255, 0.16)",
    "second": "#8a94a6",
    "warning": "#ffb07c",
}
_OF_TENSORS = {"leak", "cycles"}  # what else grows is not among the allocated bytes
_HIDDEN = {"device_used_bytes", "host_rss_bytes"}  # until they are asked for
_SMALL = {"size": 13, "color": "var(--muted)"}
_GIB, _MIB = 2**30, 2**20
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def figure(run: Run) -> dict[str, Any]:
    """The figure: what was allocated and reserved, the card's limit, and marks of what happened.

    Args:
        run: A run with readings.

    Returns:
        `{"data": […], "layout": {…}}`, as Plotly takes it once `painted`.
    """
    scale = _Scale(max(run.most_bytes or 0, run.card_bytes or 0))
    traces = [*_lines(run, scale), *_limit(run, scale), *_growth(run, scale), *_marks(run, scale)]
    return {"data": traces, "layout": _layout(scale)}


def painted(node: Any, palette: dict[str, str]) -> Any:
    """The figure with the colours of a palette in the places of their names."""
    if isinstance(node, dict):
        return {name: painted(entry, palette) for name, entry in node.items()}
    if isinstance(node, list):
        return [painted(entry, palette) for entry in node]
    if isinstance(node, str) and node.startswith("var(--"):
        return palette.get(node[6:-1], node)
    return node


class _Scale:
    """Bytes in the unit of the axis."""

    def __init__(self, largest_bytes: int) -> None:
        self.unit, self._unit_bytes = ("GiB", _GIB) if largest_bytes > _GIB else ("MiB", _MIB)

    def __call__(self, size_bytes: float | None) -> float | None:
        return None if size_bytes is None else round(size_bytes / self._unit_bytes, 4)


def _lines(run: Run, scale: _Scale) -> Iterator[dict[str, Any]]:
    steps = [reading for reading in run.readings if reading.phase == "train"]
    elapsed = [f"{duration(reading.time_s)} into the run" for reading in steps]
    for name, label, line in (
        ("device_used_bytes", "used on the card by all", {"color": "var(--muted)", "dash": "dash"}),
        ("peak_reserved_bytes", "reserved, peak", {"color": "var(--second)"}),
        ("peak_allocated_bytes", "allocated, peak", {"color": "var(--accent)"}),
        ("allocated_bytes", "allocated after the step", {"color": "var(--accent)", "dash": "dot"}),
        ("host_rss_bytes", "host memory", {"color": "var(--second)", "dash": "dot"}),
    ):
        sizes = [getattr(reading, name) for reading in steps]
        if all(size is None for size in sizes):
            continue
        risen = name.startswith("peak") and None in sizes
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines",
            "name": f"{label} so far" if risen else label,
            "x": [reading.step for reading in steps],
            "y": [scale(size) for size in (_so_far(sizes) if risen else sizes)],
            "line": {"width": 1.5, **line},
            "hovertemplate": f"%{{y:.2f}} {scale.unit}",
            "visible": name not in _HIDDEN or run.most_bytes == run.largest(name),
        }
        if name == "peak_allocated_bytes":
            trace |= {"fill": "tozeroy", "fillcolor": "var(--accent-fill)", "text": elapsed}
            trace["hovertemplate"] += ", %{text}"
        yield trace


def _so_far(sizes: Sequence[int | None]) -> Iterator[int | None]:
    """The highest until then: without counters of its own a peak is known only where it rose."""
    highest = None
    for size in sizes:
        highest = size if highest is None else max(highest, size or 0)
        yield highest


def _limit(run: Run, scale: _Scale) -> Iterator[dict[str, Any]]:
    steps = run.column("step")
    if run.card_bytes is not None:
        yield {
            "type": "scatter",
            "mode": "lines",
            "name": "card",
            "x": [min(steps), max(steps)],
            "y": [scale(run.card_bytes)] * 2,
            "line": {"color": "var(--warning)", "width": 1.5, "dash": "dash"},
            "hovertemplate": f"%{{y:.2f}} {scale.unit}",
        }


def _growth(run: Run, scale: _Scale) -> Iterator[dict[str, Any]]:
    """What a finding says, as a line from the step since which memory grows."""
    steps, allocated = run.column("step"), run.column("allocated_bytes")
    for finding in run.findings or ():
        if finding.kind not in _OF_TENSORS or finding.withdrawn:
            continue
        if not finding.bytes_per_step or finding.since_step is None:
            continue
        later = (
            size
            for step, size in zip(steps, allocated, strict=True)
            if step >= finding.since_step and size is not None
        )
        start = next(later, None)
        if start is None:
            continue
        passed = max(steps) - finding.since_step
        yield {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "growth",
            "x": [finding.since_step, max(steps)],
            "y": [scale(start), scale(start + passed * finding.bytes_per_step)],
            "line": {"color": "var(--warning)", "width": 2},
            "marker": {"symbol": "triangle-up", "size": 9},
            "text": [_plain(finding.message)] * 2,
            "hovertemplate": "%{text}",
        }


def _marks(run: Run, scale: _Scale) -> Iterator[dict[str, Any]]:
    rows = list(
        zip(
            run.column("step"),
            run.column("phase"),
            run.column("peak_allocated_bytes"),
            run.column("allocated_bytes"),
            strict=True,
        )
    )
    for phase, label, symbol in (("eval", "evaluation", "diamond"), ("save", "save", "square")):
        found = [(step, peak or now) for step, kind, peak, now in rows if kind == phase]
        texts = [
            f"{label} at step {step}" + (f": {format_bytes(size)}" if size else "")
            for step, size in found
        ]
        points = [(step, scale(size or 0)) for step, size in found]
        yield from _points(label, points, texts, symbol, "var(--muted)", 7)
    failed = [list(at) for _, at in groupby(run.recoveries, key=lambda r: r.event.step)]
    top = run.card_bytes or run.most_bytes
    points = [(at[0].event.step, scale(top)) for at in failed]
    texts = ["<br>".join(map(_told, at)) for at in failed]
    yield from _points("recovery", points, texts, "x", "var(--warning)", 10)


def _points(
    label: str,
    points: Sequence[tuple[int, float | None]],
    texts: Iterable[str],
    symbol: str,
    color: str,
    size: int,
) -> Iterator[dict[str, Any]]:
    if points:
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": label,
            "x": [step for step, _ in points],
            "y": [height for _, height in points],
            "text": list(texts),
            "marker": {"symbol": symbol, "size": size, "color": color},
            "hovertemplate": "%{text}",
        }


def _told(recovery: Recovery) -> str:
    event = recovery.event
    asked = "" if event.asked_bytes is None else f", asked {format_bytes(event.asked_bytes)}"
    return _plain(f"{event.phase}{asked}: {taken(recovery)}, {changed(recovery)}")


def _plain(text: str) -> str:
    """Text in which Plotly finds no markup, for it takes a part of HTML in labels."""
    return str(escape(text))


def _layout(scale: _Scale) -> dict[str, Any]:
    axis = {
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "tickfont": {"color": "var(--muted)", "size": 12},
        "automargin": True,
    }
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _FONT, "color": "var(--text)", "size": 13},
        "margin": {"l": 56, "r": 16, "t": 36, "b": 44},
        "hovermode": "x unified",
        "hoverlabel": {
            "bgcolor": "var(--surface)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--text)"},
        },
        "legend": {"orientation": "h", "x": 0, "y": -0.16, "xanchor": "left", "yanchor": "top"},
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)",
            "color": "var(--muted)",
            "activecolor": "var(--accent)",
        },
        "uirevision": "kept",  # what was zoomed stays so when the colours change
        "xaxis": {
            **axis,
            "title": {"text": "optimizer step", "font": _SMALL, "standoff": 8},
            "hoverformat": "d",
            "unifiedhovertitle": {"text": "step %{x}"},
        },
        "yaxis": {**axis, "title": {"text": scale.unit, "font": _SMALL}, "rangemode": "tozero"},
    }
