"""Finish the fine-tune when CUDA runs out of memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oomguard.diagnosis.diagnose import diagnose
    from oomguard.diagnosis.finding import Diagnosis, Finding
    from oomguard.errors import (
        ConfigurationError,
        LadderExhaustedError,
        NothingFitsError,
        OomguardError,
        UnsupportedTrainerError,
    )
    from oomguard.event import OOMEvent
    from oomguard.guard import Guard, fit
    from oomguard.ladder import Ladder
    from oomguard.plan import Plan
    from oomguard.prediction.estimate import estimate
    from oomguard.prediction.result import Estimate
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
    from oomguard.search import find_plan
    from oomguard.search_result import SearchResult
    from oomguard.watch.leak import LeakDetector
    from oomguard.watch.reporter import VRAMReporter

__version__ = "0.1.0"

__all__ = [
    "CheckpointActivations",
    "ConfigurationError",
    "Diagnosis",
    "Estimate",
    "Fidelity",
    "Finding",
    "Guard",
    "HalveSequence",
    "Ladder",
    "LadderExhaustedError",
    "LeakDetector",
    "LowerRank",
    "NarrowTargets",
    "NothingFitsError",
    "OOMEvent",
    "OffloadActivations",
    "OomguardError",
    "PageOptimizer8bit",
    "Plan",
    "Recovery",
    "ReleaseCache",
    "Report",
    "Rung",
    "SearchResult",
    "SplitBatch",
    "UnsupportedTrainerError",
    "VRAMReporter",
    "diagnose",
    "estimate",
    "find_plan",
    "fit",
]

_MODULES = (
    "errors",
    "event",
    "guard",
    "ladder",
    "plan",
    "report",
    "rung",
    "rungs",
    "prediction.estimate",
    "prediction.result",
    "search",
    "search_result",
    "watch.leak",
    "watch.reporter",
    "diagnosis.finding",
    "diagnosis.diagnose",
)


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds and half a GiB; the process that supervises a script
    # should start at once and stay small where the host is short of memory.
    if name in __all__:
        for module in map(import_module, (f"oomguard.{entry}" for entry in _MODULES)):
            if name in vars(module):
                globals()[name] = vars(module)[name]
                return globals()[name]
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
