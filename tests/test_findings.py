from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from oomguard.errors import ConfigurationError
from oomguard.watch.findings import Finding, load_findings, save_findings

if TYPE_CHECKING:
    from pathlib import Path

FOUND = [
    Finding(
        kind="leak",
        message="memory grows",
        step=300,
        bytes_per_step=1024.5,
        since_step=12,
        bytes_so_far=300 * 1024,
        phase="train",
        full_at_step=(900, 1000),
        holder="MyCallback.outputs > list[84 of 114]",
        stacks=("train.py:3 step",),
        advice="detach",
    ),
    Finding(kind="neighbour", message="somebody else", withdrawn=True),
]


def test_findings_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "findings.json"
    save_findings(FOUND, path)
    assert load_findings(path) == FOUND
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_a_later_version_added_is_left_out() -> None:
    assert Finding.from_dict({**FOUND[0].to_dict(), "colour": "red"}) == FOUND[0]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"kind": "leak"}]', '[{"kind": "x", "message": ""}]', "null"]
)
def test_another_file_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"other\.json"):
        load_findings(path)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    save_findings(FOUND[:1], path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        save_findings(FOUND, blocked / "findings.json")
    assert load_findings(path) == FOUND[:1]
