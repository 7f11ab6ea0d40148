"""The closed form on models that its margin was not fitted on.

    python -m benchmarks.closed_form

The margin that underestimates no run of one half of the measured models is applied to the other
half, both ways round.
"""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console

from benchmarks.prediction import DATA, config_of, rows_of
from oomguard.plan import Plan
from oomguard.prediction import closed_form
from oomguard.prediction.model import meta_model
from oomguard.prediction.predictor import rows_of as rows_of_plan
from oomguard.prediction.settings import Settings


def ratio(row: dict[str, Any]) -> float:
    """Measured peak of allocated bytes for one of the closed form without its margin."""
    config, settings = config_of(row["config"]), Settings(**row["settings"])
    plan = Plan.from_dict(row["plan"])
    model = meta_model(config, settings)
    parts = closed_form.peak(config, model, plan, settings, rows_of_plan(plan))
    bare = sum(parts.values()) / closed_form.MARGIN
    return float(row["peak_allocated_bytes"] / bare)


def main() -> None:
    """Print how the margin of each half does on the other."""
    rows = [row for path in sorted(DATA.glob("*.json")) for row in rows_of(path)]
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if "peak_allocated_bytes" in row:
            ratios.setdefault(row["model"], []).append(ratio(row))
    models = sorted(ratios)
    console = Console(width=110)
    for fitted, judged in ((models[::2], models[1::2]), (models[1::2], models[::2])):
        margin = max(value for model in fitted for value in ratios[model])
        found = [margin / value - 1 for model in judged for value in ratios[model]]
        console.print(
            f"margin {margin:.3f} from {', '.join(fitted)}: of {len(found)} runs of "
            f"{', '.join(judged)} it underestimates {sum(e < 0 for e in found)}, at worst by "
            f"{min(0.0, *found):.1%}; mean error {statistics.mean(map(abs, found)):.0%}"
        )


if __name__ == "__main__":
    main()
