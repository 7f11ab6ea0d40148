"""Finish the fine-tune when CUDA runs out of memory."""

from oomguard.errors import (
    ConfigurationError,
    LadderExhaustedError,
    OomguardError,
    UnsupportedTrainerError,
)
from oomguard.event import OOMEvent
from oomguard.guard import Guard, fit
from oomguard.ladder import (
    CheckpointActivations,
    Fidelity,
    HalveSequence,
    Ladder,
    Rung,
    SplitBatch,
)
from oomguard.plan import Plan
from oomguard.report import Recovery, Report

__version__ = "0.1.0"

__all__ = [
    "CheckpointActivations",
    "ConfigurationError",
    "Fidelity",
    "Guard",
    "HalveSequence",
    "Ladder",
    "LadderExhaustedError",
    "OOMEvent",
    "OomguardError",
    "Plan",
    "Recovery",
    "Report",
    "Rung",
    "SplitBatch",
    "UnsupportedTrainerError",
    "fit",
]
