"""`oomguard report`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import oomguard
from oomguard.cli import app
from oomguard.report import Report
from oomguard.testing import VirtualCard
from tests import tiny
from tests.browser import needs_chromium
from tests.runs import LEAK, write_run

if TYPE_CHECKING:
    from pathlib import Path


def report(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "120"})


def refused(done: Any) -> str:
    """The one line of a refusal."""
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return str(done.stderr)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "llama-lora")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_table_is_printed_and_the_page_lies_beside_the_report(folder: Path) -> None:
    done = report(folder)
    assert done.exit_code == 0, done.stderr
    for part in (
        *("oomguard: 2 recoveries", "CheckpointActivations", "memory: ██", "peak 11.51 GiB of 12"),
        *(LEAK.message, "page: "),
    ):
        assert part in done.stdout
    assert "oomguard.html" in done.stdout.replace("\n", "")
    assert "<h1>llama-lora" in (folder / "oomguard.html").read_text("utf-8")


def test_the_page_goes_where_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    before = names(folder)
    assert report(folder, "--html", tmp_path / "new" / "page.html").exit_code == 0
    assert names(tmp_path / "new") == {"page.html"}
    assert names(folder) == before


def test_json_is_one_object_with_all_that_is_known(folder: Path) -> None:
    done = report(folder, "--json")
    values = json.loads(done.stdout)
    assert done.exit_code == 0
    assert values["report"]["status"] == "finished"
    assert values["findings"][0]["holder"] == LEAK.holder
    assert values["card_bytes"] > values["peak_allocated_bytes"] > 0
    assert (values["html"], values["png"]) == (str(folder / "oomguard.html"), None)


BROKEN = ["", "{", "[" * 10**5, '{"schema": "oomguard.report/1", "plan": 3}', {"seconds": "1 h"}]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: str(content)[:20])
def test_a_broken_report_is_one_line_and_nothing_is_written(folder: Path, content: Any) -> None:
    path = folder / "oomguard.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    before = names(folder)
    assert "oomguard.json" in refused(report(folder))
    assert names(folder) == before


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    assert "has no oomguard.json" in refused(report(tmp_path))
    assert "is not a folder" in refused(report(tmp_path / "nowhere"))
    assert names(tmp_path) == set()


def test_of_a_run_without_a_guard_is_shown_what_was_watched(folder: Path) -> None:
    (folder / "oomguard.json").unlink()
    done = report(folder)
    assert done.exit_code == 0, done.stderr
    for part in ("llama-lora: watched, without a guard", "memory: ██", LEAK.message):
        assert part in done.stdout
    html = (folder / "oomguard.html").read_text("utf-8")
    assert 'id="timeline"' in html
    assert not any(f'id="{part}"' in html for part in ("ladder", "plan", "prediction", "error"))
    assert json.loads(report(folder, "--json").stdout)["report"] is None
    (folder / "oomguard_vram.parquet").unlink()
    assert LEAK.message in report(folder).stdout


def test_of_what_was_watched_nothing_may_be_readable(folder: Path) -> None:
    for name in ("oomguard.json", "oomguard_findings.json"):
        (folder / name).unlink()
    (folder / "oomguard_vram.parquet").write_text("")
    assert "not a series of memory readings" in refused(report(folder))
    assert names(folder) == {"oomguard_vram.parquet"}


def test_a_place_that_cannot_be_written_to_is_one_line(folder: Path, tmp_path: Path) -> None:
    assert "oomguard.json" in refused(report(folder, "--html", folder / "oomguard.json" / "x.html"))
    (tmp_path / "taken").mkdir()
    assert "taken" in refused(report(folder, "--html", tmp_path / "taken"))
    assert names(tmp_path) == {"llama-lora", "taken"}


@pytest.mark.parametrize("package", ["plotly", "kaleido"])
def test_a_package_that_is_missing_is_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    before = names(folder)
    line = refused(report(folder, "--png", tmp_path / "timeline.png"))
    assert package in line.lower()
    assert "pip install 'oomguard[report]'" in line
    assert names(folder) == before
    assert not (tmp_path / "timeline.png").exists()


@needs_chromium
def test_the_picture_is_a_png_of_the_timeline(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "kaleido", reason="kaleido draws the picture: pip install 'oomguard[report]'"
    )
    path = tmp_path / "timeline.png"
    done = report(folder, "--png", path)
    assert done.exit_code == 0, done.stderr
    assert "picture: " in done.stdout
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(head[at : at + 4], "big") for at in (16, 20)] == [2400, 1200]


def test_without_a_browser_that_starts_there_is_no_picture(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "kaleido", reason="kaleido draws the picture: pip install 'oomguard[report]'"
    )
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    assert "install one" in refused(report(folder, "--png", tmp_path / "timeline.png"))
    assert names(tmp_path) == {"llama-lora"}


def test_without_readings_there_is_no_picture(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows=())
    assert "no readings of memory" in refused(report(folder, "--png", tmp_path / "x.png"))
    assert "oomguard.html" not in names(folder)


@pytest.mark.parametrize("content", ["{}{", '[{"kind": "leak", "message": 3}]'])
def test_what_is_left_out_is_said(folder: Path, content: str) -> None:
    (folder / "oomguard_findings.json").write_text(content)
    done = report(folder)
    assert done.exit_code == 0
    assert "left out: " in done.stdout


def test_a_real_run_is_shown_as_it_was(tmp_path: Path) -> None:
    trainer: Any = tiny.sft_trainer(tmp_path / "real", max_steps=3)
    trainer.add_callback(oomguard.LeakDetector())
    with VirtualCard(fail_at=900) as card:
        card.track(trainer.model)
        own = oomguard.fit(trainer, ladder="exact_first")
    assert len(own.recoveries) == 1
    done = report(tmp_path / "real")
    assert done.exit_code == 0, done.stderr
    assert "memory: " in done.stdout
    html = (tmp_path / "real" / "oomguard.html").read_text("utf-8")
    assert "Watched, and nothing was found." in html
    for part in ("allocated, peak", '"name":"recovery"', "SFTConfig(", own.versions["torch"]):
        assert part in html
    assert own.to_html() == Report.load(tmp_path / "real" / "oomguard.json").to_html()
