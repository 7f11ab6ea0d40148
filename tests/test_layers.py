"""The layer order of the package. Private names are ruff's part (SLF001 in pyproject.toml)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# Lowest first: a module imports only from entries before its own, or from its own package.
LAYERS = (
    "errors",
    "typed",
    "plan",
    "event",
    "rung",
    "rungs",
    "ladder",
    "memory",
    "rng",
    "journal",
    "resumption",
    "watch",
    "oom",
    "retry",
    "feed",
    "optimizer_step",
    "levers",
    "prediction",
    "rollouts",
    "jump",
    "report",
    "forecast",
    "checkpoint",
    "descent",
    "outside",
    "evaluation",
    "saving",
    "callbacks",
    "step",
    "rollout_step",
    "protection",
    "hooks",
    "trial",
    "trials",
    "search_space",
    "largest_plan",
    "snippet",
    "search_result",
    "budget",
    "card_search",
    "search",
    "find_command",
    "starting",
    "guard",
    "guarded_train",
    "under_guard",
    "diagnosis",
    "supervise",
    "doctor_trial",
    "doctor",
    "__init__",
    "cli_options",
    "cli",
    "__main__",
)
# Stands beside the order: nothing in the package imports `testing`, which sees only these.
TESTING = "testing"
TESTING_SEES = ("errors", "plan", "event", "memory")
DEVICE_MODULES = {"memory.device"}  # the only home of torch.cuda and NVML

ROOT = Path(__file__).parents[1] / "oomguard"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_bytes(), path) for path in ROOT.rglob("*.py")}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Full dotted names; `from a import b` gives `a.b`. Relative imports are banned by ruff."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """The layers that a module imports; a name that is no module belongs to the top `__init__`."""
    names = (name.split(".") for name in imported_names(tree))
    entries = {[*parts, "__init__"][1] for parts in names if parts[0] == "oomguard"}
    return {entry if entry in {*LAYERS, TESTING} else "__init__" for entry in entries}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downward(module: str) -> None:
    layer = module.split(".")[0]
    assert layer in {*LAYERS, TESTING}, (
        f"{module}: list '{layer}' in LAYERS of tests/test_layers.py"
    )
    allowed = TESTING_SEES if layer == TESTING else LAYERS[: LAYERS.index(layer)]
    forbidden = own_imports(MODULES[module]) - {*allowed, layer}
    assert not forbidden, f"{module} may not import {sorted(forbidden)}: they are above it"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - DEVICE_MODULES))
def test_the_device_is_read_in_one_module(module: str) -> None:
    tree = MODULES[module]
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = sorted(
        name
        for name in attributes | set(imported_names(tree))
        if f"{name}.".startswith(("torch.cuda.", "pynvml."))
    )
    assert not found, f"{module} uses {found}: ask oomguard.memory.device instead"


def loaded_with(module: str) -> set[str]:
    """The modules of the package that are imported when `module` is."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name in found or name not in MODULES:
            continue
        found.add(name)
        body: list[ast.stmt] = [
            node for node in MODULES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        dotted = [one.removeprefix("oomguard.") for one in imported_names(ast.Module(body, []))]
        waiting += [*dotted, *(one.rpartition(".")[0] for one in dotted)]
    return found


def test_what_trains_loads_no_estimator_before_it_is_asked() -> None:
    loaded = {name.split(".")[0] for name in loaded_with("guard")}
    assert {"hooks", "step", "descent"} <= loaded
    assert not loaded & {"prediction", "forecast", "search", "starting"}
