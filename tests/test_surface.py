from importlib.metadata import version
from typing import Any

import typer

import oomguard
from oomguard.cli import app
from oomguard.testing import VirtualCard

SURFACE = (
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
)

FINE_TUNE = {
    *("--model", "--quantization", "--dtype", "--lora-r", "--target-modules", "--dora"),
    *("--rslora", "--full", "--batch-size", "--max-length", "--gradient-checkpointing"),
    *("--optim", "--attn", "--padded", "--trainer", "--card"),
}
COMMANDS = {
    "": {"--version"},
    "diagnose": {"script", "arguments", "-m", "--json"},
    "doctor": {"--json"},
    "estimate": {*FINE_TUNE, "--json"},
    "find": {*FINE_TUNE, "--maximize", "--free", "--json"},
    "report": {"run_dir", "--html", "--png", "--json"},
    "run": {"script", "arguments", "-m", "--ladder", "--max-restarts", "--resume", "--json"},
}


def test_the_commands_and_their_options_are_these() -> None:
    group: Any = typer.main.get_command(app)
    found = {"": group, **group.commands}
    assert {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in found.items()
    } == COMMANDS


def test_the_public_names_are_these() -> None:
    assert tuple(sorted(oomguard.__all__)) == SURFACE


def test_every_public_name_exists() -> None:
    assert [name for name in SURFACE if not hasattr(oomguard, name)] == []


def test_the_version_is_that_of_the_installed_package() -> None:
    assert oomguard.__version__ == version("oomguard")


def test_the_virtual_card_is_imported_from_testing() -> None:
    assert VirtualCard.__module__ == "oomguard.testing"
