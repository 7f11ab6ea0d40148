"""The timeline as a PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oomguard.errors import ConfigurationError
from oomguard.report.timeline import LIGHT, figure, painted

if TYPE_CHECKING:
    from oomguard.report.run import Run

_SIZE = {"width": 1200, "height": 600, "scale": 2}


def picture(run: Run) -> bytes:
    """The timeline, 2400 x 1200 pixels, in light colours.

    Raises:
        ConfigurationError: There is nothing to draw, or what draws it is missing.
    """
    if not run.readings:
        msg = f"{run.name}: there are no readings of memory to draw a picture of."
        raise ConfigurationError(msg)
    try:
        import kaleido
        import plotly  # noqa: F401 - kaleido draws with the plotly.js in it
        from kaleido import errors
    except ImportError as error:
        msg = (
            f"A PNG is drawn with Plotly and Kaleido, and {error.name} is not installed: "
            "pip install 'oomguard[report]'."
        )
        raise ConfigurationError(msg) from error
    drawn: dict[str, Any] = painted(figure(run), LIGHT)
    drawn["layout"] |= {"paper_bgcolor": LIGHT["surface"], "plot_bgcolor": LIGHT["surface"]}
    try:
        # Kaleido would load MathJax from the network.
        image: bytes = kaleido.calc_fig_sync(
            drawn, opts={"format": "png", **_SIZE}, kopts={"mathjax": False}
        )
    except (
        errors.ChromeNotFoundError,
        errors.BrowserFailedError,
        errors.BrowserClosedError,
    ) as error:
        msg = (
            "Kaleido draws in Chrome or Chromium, and none was found or none starts: (a) install "
            "one, with apt-get install chromium or plotly_get_chrome, or (b) leave --png out and "
            "use the camera button of the page."
        )
        raise ConfigurationError(msg) from error
    return image
