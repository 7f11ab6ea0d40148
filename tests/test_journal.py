"""What a supervised script reports survives its process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oomguard.journal import Journal, TrainCall

if TYPE_CHECKING:
    from pathlib import Path


def call(key: str) -> TrainCall:
    return TrainCall(
        key=key, output_dir="out", stale={"checkpoint-2": 7}, resume=None, saves="save_steps=2"
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.new_life()
    journal.begin(call("a"))
    journal.step(9)
    journal.step(10)
    journal.finish("a", {"global_step": 10})
    journal.end("crash", "ValueError: x")
    story = Journal(tmp_path).read()
    assert (story.step, story.current) == (10, "a")
    assert story.calls["a"].output == {"global_step": 10}
    assert story.calls["a"].stale == {"checkpoint-2": 7}
    assert story.end is not None
    assert (story.end["kind"], story.end["error"]) == ("crash", "ValueError: x")


def test_a_new_life_has_made_no_step_and_keeps_the_calls(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(call("a"))
    journal.step(3)
    journal.end("crash", "ValueError: x")
    journal.new_life()
    story = journal.read()
    assert (story.step, story.current, story.end) == (None, None, None)
    assert list(story.calls) == ["a"]


def test_a_call_that_begins_again_keeps_what_it_first_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(call("a"))
    again = call("a")
    again.stale = {}
    journal.begin(again)
    assert journal.read().calls["a"].stale == {"checkpoint-2": 7}


def test_a_line_cut_short_by_a_kill_is_left_out_and_the_next_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(call("a"))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "finish", "ke')
    journal.begin(call("b"))
    story = journal.read()
    assert list(story.calls) == ["a", "b"]
    assert story.calls["a"].output is None
