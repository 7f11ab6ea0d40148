from importlib.metadata import version

import oomguard
from oomguard.testing import VirtualCard

SURFACE = (
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
)


def test_the_public_names_are_these() -> None:
    assert tuple(sorted(oomguard.__all__)) == SURFACE


def test_every_public_name_exists() -> None:
    assert [name for name in SURFACE if not hasattr(oomguard, name)] == []


def test_the_version_is_that_of_the_installed_package() -> None:
    assert oomguard.__version__ == version("oomguard")


def test_the_virtual_card_is_imported_from_testing() -> None:
    assert VirtualCard.__module__ == "oomguard.testing"
