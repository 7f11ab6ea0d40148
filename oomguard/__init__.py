"""Finish the fine-tune when CUDA runs out of memory."""

from oomguard.errors import (
    ConfigurationError,
    LadderExhaustedError,
    OomguardError,
    UnsupportedTrainerError,
)
from oomguard.event import OOMEvent
from oomguard.guard import Guard, fit
from oomguard.ladder import Ladder
from oomguard.plan import Plan
from oomguard.report import Recovery, Report
from oomguard.rung import Fidelity, Rung
from oomguard.rungs import (
    CheckpointActivations,
    HalveSequence,
    LowerRank,
    NarrowTargets,
    OffloadActivations,
    PageOptimizer8bit,
    ReleaseCache,
    SplitBatch,
)

__version__ = "0.1.0"

__all__ = [
    "CheckpointActivations",
    "ConfigurationError",
    "Fidelity",
    "Guard",
    "HalveSequence",
    "Ladder",
    "LadderExhaustedError",
    "LowerRank",
    "NarrowTargets",
    "OOMEvent",
    "OffloadActivations",
    "OomguardError",
    "PageOptimizer8bit",
    "Plan",
    "Recovery",
    "ReleaseCache",
    "Report",
    "Rung",
    "SplitBatch",
    "UnsupportedTrainerError",
    "fit",
]
