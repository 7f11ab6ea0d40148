"""`oomguard find`: its table, its JSON, and its errors of one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from transformers import BertConfig

from oomguard.find_command import Found, as_json, as_table, find
from oomguard.search_result import SearchResult
from tests.test_cli import invoke
from tests.test_search import WIDE
from tests.tiny import needs_fused_head

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    WIDE.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def of_all_sizes(model: str) -> Found:
    """What a full fine-tune finds on cards of every size."""
    settings = {"lora_r": None, "per_device_train_batch_size": 1, "max_length": 1024}
    return find(model, None, maximize="micro_batch_size", free=(), settings=settings)


def printed(found: Found) -> str:
    console = Console(width=120)
    with console.capture() as text:
        console.print(as_table(found))
    return text.get()


@needs_fused_head
def test_json_has_plan_estimate_measured_and_runners_up(model: str) -> None:
    options = ("--quantization", "nf4", "--max-length", "512", "--maximize", "micro_batch_size")
    done = invoke("find", "--model", f"{model}/config.json", "--card", "4GiB", *options, "--json")
    values = json.loads(done.stdout)
    assert {"plan", "estimate", "measured", "runners_up", "seconds"} <= values.keys()
    assert values["measured"] is None
    assert values["plan"]["max_length"] == 512
    assert values["plan"]["micro_batch_size"] >= 1
    assert values["estimate"]["settings"]["quantization"] == "nf4"


@needs_fused_head
def test_without_a_card_every_size_has_its_line(of_all_sizes: Found) -> None:
    assert list(of_all_sizes) == [f"{size}GiB" for size in (8, 12, 16, 24, 40, 48, 80)]
    lines = [line for line in printed(of_all_sizes).splitlines() if "GiB" in line]
    assert [line.split()[0] for line in lines] == list(of_all_sizes)
    assert "nothing fits" in lines[0]
    assert "full" in lines[-1]
    for one in of_all_sizes.values():
        if isinstance(one, SearchResult):
            assert one.estimate.device_bytes <= (one.card.total_bytes or 0)


@needs_fused_head
def test_one_card_gives_the_plan_and_its_code(of_all_sizes: Found) -> None:
    text = printed({"80GiB": of_all_sizes["80GiB"]})
    for part in ("80.00 GiB card", "found", "SFTConfig("):
        assert part in text


@needs_fused_head
def test_json_of_all_cards_begins_with_the_smallest_that_has_a_plan(of_all_sizes: Found) -> None:
    values = json.loads(json.dumps(as_json(of_all_sizes)))
    every = values["cards"]
    assert len(every) == 7
    assert "error" in every[0]
    first = next(one for one in every if "plan" in one)
    assert values["plan"] == first["plan"]


@needs_fused_head
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--card", "1GiB"), "nothing fits 1024.00 MiB"),
        (("--card", "banana"), "neither a size"),
        (("--card", "8GiB", "--full", "--lora-r", "8"), "leave out one"),
        (("--card", "8GiB", "--full", "--quantization", "nf4"), "cannot be trained whole"),
        (("--card", "8GiB", "--full", "--maximize", "lora_r"), "full fine-tune"),
        (("--card", "8GiB", "--free", "learning_rate"), "free names 'learning_rate'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    model: str, options: tuple[str, ...], said: str
) -> None:
    done = invoke("find", "--model", model, *options)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    for name in (str(tmp_path / "nothing"), str(tmp_path / "bert")):
        done = invoke("find", "--model", name, "--card", "8GiB")
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1


@pytest.mark.slow  # the hub is tried six times
def test_a_hub_that_cannot_be_reached_is_said_in_one_line() -> None:
    command = (sys.executable, "-m", "oomguard", "estimate", "--model", "an/unknown-model")
    done = subprocess.run(  # noqa: S603 - our own module
        command,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no configuration of a model can be read from 'an/unknown-model'" in done.stderr
