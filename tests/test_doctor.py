"""What the doctor says of this machine, and of others."""

from __future__ import annotations

import io
import json
import random
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console

import oomguard
from oomguard import doctor
from oomguard.doctor_trial import try_8bit_optimizer, try_rung
from oomguard.ladder import Ladder
from oomguard.memory.device import Device
from oomguard.rung import Fidelity, Rung
from oomguard.rungs import HalveSequence

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def here() -> doctor.Findings:
    return doctor.examine()


def shown(findings: doctor.Findings) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(findings)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_every_package_has_the_range_of_the_metadata(here: doctor.Findings) -> None:
    assert here.packages[0].name == "python"
    names = {package.name for package in here.packages}
    assert {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"} <= names
    assert names.isdisjoint({"pytest", "plotly", "ruff"}), "extras are not needed"
    torch_ = next(package for package in here.packages if package.name == "torch")
    assert (torch_.installed, torch_.ok) == (torch.__version__, True)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"torch{torch_.supported}" in wanted


def test_every_rung_of_the_default_ladder_is_tried_here(here: doctor.Findings) -> None:
    ladder = Ladder.of("default")
    assert len(here.rungs) == len(ladder)
    for trial, rung in zip(here.rungs, ladder, strict=True):
        assert isinstance(rung, Rung)
        assert (trial.name, trial.fidelity) == (rung.name, rung.fidelity)
        assert not trial.failed, trial.why_not
        assert bool(trial.change) != bool(trial.why_not)
        assert trial.does
    changes = {trial.name: trial.change for trial in here.rungs}
    assert changes["SplitBatch"] == "4 x 1 -> 2 x 2 passes"


def test_a_rung_that_cannot_act_says_why() -> None:
    trial = try_rung(HalveSequence(floor=512))
    assert (trial.change, trial.failed) == ("", False)
    assert trial.why_not == "rows of 512 tokens are not above floor=512"


@dataclass(frozen=True)
class Breaks(Rung):
    """Fails when it is asked."""

    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def __call__(self, plan: oomguard.Plan, event: oomguard.OOMEvent) -> oomguard.Plan | None:
        msg = "a library is missing"
        raise RuntimeError(msg)


def test_a_rung_that_breaks_is_a_finding(here: doctor.Findings) -> None:
    trial = try_rung(Breaks())
    assert trial.failed
    assert trial.why_not == "RuntimeError: a library is missing"
    ill = replace(here, rungs=(trial,))
    assert not ill.healthy
    assert "failed: RuntimeError: a library is missing" in shown(ill)


def test_a_trial_leaves_random_numbers_and_output_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = random.getstate(), torch.get_rng_state()
    try_rung(oomguard.SplitBatch())
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert capfd.readouterr().out == ""


def test_the_8_bit_optimizer_makes_a_real_step() -> None:
    pytest.importorskip("bitsandbytes")
    assert try_8bit_optimizer() is None


def test_findings_are_shown_and_are_json(here: doctor.Findings) -> None:
    card = Device("NVIDIA H100 80GB HBM3", 80 * 2**30, 79 * 2**30, "9.0", "570.1")
    text = shown(replace(here, devices=(card,), eight_bit="ImportError: no libcudart"))
    for part in (
        "NVIDIA H100 80GB HBM3, 79.00 GiB of 80.00 GiB free, capability 9.0, driver 570.1",
        "bitsandbytes): ImportError: no libcudart",
        "works: gradient_checkpointing off -> on",
        f"{torch.__version__}",
    ):
        assert part in text, text
    values = json.loads(json.dumps(here.to_dict()))
    assert (values["schema"], values["healthy"]) == ("oomguard.doctor/1", True)
    assert len(values["rungs"]) == len(here.rungs)


@pytest.mark.parametrize("installed", [None, "1.0"])
def test_a_package_out_of_range_is_ill(installed: str | None, here: doctor.Findings) -> None:
    old = doctor.Package("trl", installed, ">=1.16", ok=False)
    ill = replace(here, packages=(*here.packages, old))
    assert not ill.healthy
    assert "install a supported version" in shown(ill)


def test_an_oomguard_that_cannot_be_imported_is_a_finding(here: doctor.Findings) -> None:
    ill = replace(here, rungs=(), broken="ImportError: cannot import name 'Trainer'")
    assert not ill.healthy
    assert "ImportError: cannot import name 'Trainer'" in shown(ill)


@pytest.mark.parametrize(
    ("environment", "variable", "expandable", "wrong", "advice"),
    [
        ({}, None, False, 0, 1),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "PYTORCH_ALLOC_CONF", True, 0, 0),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True, max_split_size_mb:128"},
            "PYTORCH_CUDA_ALLOC_CONF",
            True,
            1,
            0,
        ),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "PYTORCH_ALLOC_CONF", False, 0, 1),
        (
            {
                "PYTORCH_ALLOC_CONF": "expandable_segments:True",
                "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:1",
            },
            "PYTORCH_ALLOC_CONF",
            True,
            1,
            0,
        ),
    ],
)
def test_allocator_settings_are_read_and_judged(
    environment: dict[str, str], variable: str | None, expandable: bool, wrong: int, advice: int
) -> None:
    found = doctor.allocator(environment, cuda=True)
    assert (found.variable, found.expandable_segments) == (variable, expandable)
    assert (len(found.wrong), len(found.advice)) == (wrong, advice)


def test_there_is_no_advice_on_the_allocator_without_a_gpu() -> None:
    assert doctor.allocator({}, cuda=False).advice == ()
