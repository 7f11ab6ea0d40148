"""What a supervised script reports while it runs, in files that outlive a killed process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

_EVENTS = "events.jsonl"
_STEP = "step"


@dataclass
class TrainCall:
    """One `train()` call of the script, over all lives of its process.

    Attributes:
        key: The output directory, and which of the calls that write there it is.
        output_dir: The absolute output directory.
        stale: Checkpoints that were there before the call began, by name and time of writing.
        resume: The checkpoint that the script itself asked to resume from.
        saves: The settings that decide when checkpoints are written.
        output: What the call returned; `None` before it has.
    """

    key: str
    output_dir: str
    stale: dict[str, int]
    resume: str | None
    saves: str
    output: dict[str, Any] | None = None


@dataclass
class Story:
    """What the journal tells of all lives so far.

    Attributes:
        calls: Every `train()` call by its key, in the order in which they first began.
        current: The key of the call that began last in this life; `None` before the first.
        end: Of this life: how it ended by the process's own account.
        step: Of this life: the last optimizer step that was made.
    """

    calls: dict[str, TrainCall] = field(default_factory=dict)
    current: str | None = None
    end: dict[str, Any] | None = None
    step: int | None = None


class Journal:
    """Events as JSON lines, and the step in a file of its own that is written over."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Write to and read from `folder`, which exists."""
        self.folder = Path(folder)
        self._step: Any = None

    def new_life(self) -> None:
        """The process is about to be started (again)."""
        (self.folder / _STEP).unlink(missing_ok=True)
        self._write({"event": "life"})

    def begin(self, call: TrainCall) -> None:
        """A `train()` call has begun; of a later life only its key counts."""
        self._write({"event": "begin", **vars(call)})

    def finish(self, key: str, output: dict[str, Any]) -> None:
        """A `train()` call has come to its end."""
        self._write({"event": "finish", "key": key, "output": output})

    def end(self, kind: str, error: str) -> None:
        """The script ends: `"crash"`, `"cuda"`, `"final"` or `"stopped"`."""
        self._write({"event": "end", "kind": kind, "error": error})

    def step(self, step: int) -> None:
        """An optimizer step was made; called once a step, so it is one small write."""
        if self._step is None:
            self._step = (self.folder / _STEP).open("w", encoding="ascii")
        self._step.seek(0)
        self._step.write(f"{step:<20}")
        self._step.flush()

    def read(self) -> Story:
        """All that was reported so far; a line that was not written to its end is left out."""
        story = Story()
        for line in self._lines():
            match line["event"]:
                case "life":
                    story.current = story.end = None
                case "begin":
                    call = TrainCall(**{k: v for k, v in line.items() if k != "event"})
                    story.calls.setdefault(call.key, call)
                    story.current = call.key
                case "finish":
                    story.calls[line["key"]].output = line["output"]
                case "end":
                    story.end = line
        path = self.folder / _STEP
        text = path.read_text(encoding="ascii").strip() if path.exists() else ""
        story.step = int(text) if text else None
        return story

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / _EVENTS
        found = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def _write(self, event: dict[str, Any]) -> None:
        # The leading newline ends what a killed process may have left of its last line.
        with (self.folder / _EVENTS).open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(event, default=str)}\n")
