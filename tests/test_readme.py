"""What README and docs show can be run, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl.trainer.sft_trainer

from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
NOT_RUN = {"docs/gpu.md"}  # needs a GPU
LONG = {"docs/finding.md 1", "docs/finding.md 2"}
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in sorted(PAGES)}
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"^ {4}make ([a-z-]+)|`make ([a-z-]+)`", re.MULTILINE)
# The trainer at hand needs 55 MiB with TRL's fused language-model head, 5 MiB without it.
FUSED_HEAD = hasattr(trl.trainer.sft_trainer, "add_fused_lm_head")
BLOCKS = {
    f"{page} {number}": block
    for page, text in TEXTS.items()
    if page not in NOT_RUN
    for number, block in enumerate(PYTHON.findall(text), 1)
}


@pytest.mark.parametrize(
    "block", [pytest.param(b, marks=[pytest.mark.slow] if b in LONG else []) for b in BLOCKS]
)
def test_a_python_block_runs_with_a_trainer_at_hand(block: str, tmp_path: Path) -> None:
    trainer: Any = tiny.sft_trainer(tmp_path, max_steps=2)
    text = BLOCKS[block]
    if not FUSED_HEAD:
        if "estimate(" in text:
            pytest.skip("TRL makes all logits here, which no estimate models")
        text = text.replace("40MiB", "4MiB")
    exec(  # noqa: S102 - the text is our own
        compile(text, block, "exec"), {"trainer": trainer, "model": trainer.model}
    )
    assert trainer.state.global_step == 2


def test_the_readme_has_python_blocks() -> None:
    assert sum(name.startswith("README.md") for name in BLOCKS) >= 5


@pytest.mark.parametrize("page", TEXTS)
def test_links_to_files_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[page])
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_commands_are_make_targets_or_modules(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = MAKE.findall(TEXTS[page])
    assert {target for pair in named for target in pair if target} <= targets
    for module in re.findall(r"python -m ([\w.]+)", TEXTS[page]):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_the_first_twenty_lines_show_what_it_is_how_to_get_it_and_what_it_does() -> None:
    top = "\n".join(TEXTS["README.md"].splitlines()[:20])
    for part in ("pip install", "- trainer.train()", "+ oomguard.fit(trainer)", "recoveries"):
        assert part in top
