"""Start a script, start it again when its process dies, and know when that is no use."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oomguard.journal import Journal, Story
from oomguard.resumption import last_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("oomguard.run")

SCHEMA = "oomguard.run/1"
REPORT_NAME = "oomguard.json"
_PASSED_ON = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, order=True)
class Progress:
    """How far a script has come; of two, the larger one is further.

    Attributes:
        finished: Calls of `train()` that came to their end.
        checkpoint: The step of the last whole checkpoint; 0 before the first.
        step: The last optimizer step that was made; 0 before the first.
    """

    finished: int = 0
    checkpoint: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Death:
    """How one life of the process ended, when it was not with exit status 0.

    Attributes:
        returncode: As `subprocess` gives it: a negative one is the signal that killed the process.
        kind: `"signal"`, `"cuda"` (an error after which the process cannot use the GPU), `"crash"`
            (any other exception), `"final"` (an error or exit that a restart would only repeat) or
            `"stopped"` (it was asked to end).
        error: The exception, as type and first line; empty where there was none.
        progress: How far the script had come.
        stepped: Whether this life made an optimizer step.
        output_dir: Where the training that was under way keeps its checkpoints.
        saves: The settings of that training that decide when it writes checkpoints.
    """

    returncode: int
    kind: str
    error: str = ""
    progress: Progress = Progress()
    stepped: bool = False
    output_dir: str | None = None
    saves: str = ""

    @property
    def cause(self) -> str:
        """What happened, in words."""
        if self.kind == "stopped":
            return "stopped as asked"
        if self.returncode < 0:
            name = _signal_name(-self.returncode)
            hint = " (the host's OOM killer, if nobody sent it)" if name == "SIGKILL" else ""
            return f"killed by {name}{hint}"
        said = f": {self.error}" if self.error else ""
        if self.kind == "cuda":
            return f"the GPU cannot be used any more by this process{said}"
        return f"ended with exit status {self.returncode}{said}"

    @property
    def place(self) -> str:
        """How far it had come, in words."""
        if self.output_dir is None:
            count = self.progress.finished
            return f"after {count} finished trainings" if count else "before any training began"
        step = f"after step {self.progress.step}" if self.stepped else "before a step was made"
        checkpoint = (
            f"the last whole checkpoint is checkpoint-{self.progress.checkpoint}"
            if self.progress.checkpoint
            else "there is no whole checkpoint"
        )
        return f"{step} of the training in {self.output_dir}; {checkpoint}"


@dataclass(frozen=True)
class Decision:
    """Whether to start the script again, and why not; an empty reason goes without saying."""

    restart: bool
    reason: str = ""


def decide(death: Death, furthest: Progress | None, restarts: int, max_restarts: int) -> Decision:
    """Whether a script that died is started again.

    Args:
        death: How it died.
        furthest: How far it had come in any earlier life; `None` at the first death.
        restarts: How often it was started again before.
        max_restarts: How often that may be.
    """
    if death.kind in {"stopped", "final"}:
        return Decision(restart=False)
    if death.kind == "crash" and not death.stepped:
        # A life that makes no step fails alike next time: a typing error, a wrong path, a check.
        return Decision(restart=False)
    if furthest is not None and not death.progress.checkpoint and not death.progress.finished:
        return Decision(restart=False, reason=f"no checkpoint between two deaths. {_advice(death)}")
    if furthest is not None and death.progress <= furthest:
        where = f"step {furthest.step}" if furthest.step else "the first step"
        return Decision(
            restart=False,
            reason=f"no progress since the death before, which was at {where}. {_advice(death)}",
        )
    if restarts >= max_restarts:
        return Decision(restart=False, reason=f"--max-restarts {max_restarts} is used up.")
    return Decision(restart=True)


def _advice(death: Death) -> str:
    tries = [f"(a) write checkpoints more often (now {death.saves})" if death.saves else ""]
    if death.returncode == -signal.SIGKILL:
        tries.append("(b) give the host more memory, or use fewer dataloader_num_workers")
    elif death.returncode < 0:
        tries.append("(b) run with PYTHONFAULTHANDLER=1 to see where it died")
    else:
        tries.append("(b) mend the error above: it comes back at the same place")
    return f"What to change: {'; '.join(filter(None, tries))}."


@dataclass
class Run:
    """A script under supervision.

    Attributes:
        command: Starts the script under the guard, its journal in `folder`.
        folder: Where the script reports.
        max_restarts: How often it may be started again.
        deaths: All deaths so far.
        stopped_by: The signal that asked this process to end.
    """

    command: Sequence[str]
    folder: Path
    max_restarts: int
    deaths: list[Death] = field(default_factory=list)
    stopped_by: int | None = None
    _process: subprocess.Popen[bytes] | None = None

    def supervise(self) -> int:
        """Run the script to its end; the exit status is the script's."""
        journal, furthest = Journal(self.folder), None
        with ExitStack() as handlers:
            for number in _PASSED_ON:
                former = signal.signal(number, self._pass_on)
                handlers.callback(signal.signal, number, former)
            while True:
                journal.new_life()
                returncode = self._live()
                if returncode == 0:
                    return 0
                death = self._death(returncode, journal.read())
                restarts = len(self.deaths)
                self.deaths.append(death)
                decision = decide(death, furthest, restarts, self.max_restarts)
                if not decision.restart:
                    if death.kind == "stopped" and death.progress.checkpoint:
                        message = "%s, %s. `oomguard run --resume` goes on from there."
                        logger.warning(message, death.cause, death.place)
                    elif decision.reason:
                        message = "%s, %s. Giving up: %s"
                        logger.error(message, death.cause, death.place, decision.reason)
                    return self._status(returncode)
                count = f"{restarts + 1} of {self.max_restarts}"
                logger.warning("%s, %s. Restarting (%s).", death.cause, death.place, count)
                furthest = max(death.progress, furthest or Progress())

    def summary(self, status: int) -> dict[str, Any]:
        """The whole run as JSON types."""
        calls = Journal(self.folder).read().calls.values()
        reports = [Path(call.output_dir) / REPORT_NAME for call in calls]
        stopped = any(death.kind == "stopped" for death in self.deaths)
        return {
            "schema": SCHEMA,
            "status": "finished" if status == 0 else "stopped" if stopped else "failed",
            "exit_status": status,
            "restarts": len(self.deaths) if status == 0 else max(0, len(self.deaths) - 1),
            "deaths": [{**asdict(death), "cause": death.cause} for death in self.deaths],
            "trainings": [
                {"output_dir": call.output_dir, "train_output": call.output} for call in calls
            ],
            "reports": [str(path) for path in dict.fromkeys(reports) if path.exists()],
        }

    def _live(self) -> int:
        if self.stopped_by is not None:
            return -self.stopped_by
        self._process = subprocess.Popen(self.command)  # noqa: S603 - the user's own script
        if self.stopped_by is not None:  # while it was being started
            self._process.send_signal(self.stopped_by)
        return self._process.wait()

    def _pass_on(self, number: int, frame: object) -> None:
        self.stopped_by = number
        if self._process is not None and not (number == signal.SIGINT and _typed()):
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _death(self, returncode: int, story: Story) -> Death:
        end = story.end or {}
        kind = end.get("kind", "signal" if returncode < 0 else "crash")
        if self.stopped_by is not None or -returncode in _PASSED_ON:
            kind = "stopped"
        elif returncode < 0 and kind != "cuda":  # a lost GPU often ends in an abort
            kind = "signal"
        unfinished = [call for call in story.calls.values() if call.output is None]
        # A life that came to no training has not moved on from where the one before died.
        call = unfinished[-1] if unfinished else None
        checkpoint = None if call is None else last_checkpoint(call.output_dir, call.stale)
        progress = Progress(
            finished=len(story.calls) - len(unfinished),
            checkpoint=0 if checkpoint is None else checkpoint.step,
            step=0 if story.step is None or call is None else story.step,
        )
        return Death(
            returncode=returncode,
            kind=kind,
            error=end.get("error", ""),
            progress=progress,
            stepped=story.step is not None,
            output_dir=None if call is None else call.output_dir,
            saves="" if call is None else call.saves,
        )

    def _status(self, returncode: int) -> int:
        """As a shell gives it; a script that was asked to end has ended by that signal."""
        return returncode if returncode > 0 else 128 - returncode


def run(
    arguments: Sequence[str], *, module: bool, ladder: str, resume: bool, max_restarts: int
) -> tuple[int, dict[str, Any]]:
    """Run a script under the guard and supervise it.

    Args:
        arguments: The script and its arguments.
        module: Whether the script is the name of a module, as after `python -m`.
        ladder: The preset that its trainings use.
        resume: Whether trainings go on from checkpoints of an earlier run.
        max_restarts: How often the script may be started again.

    Returns:
        The script's exit status, and the run as JSON types.
    """
    with tempfile.TemporaryDirectory(prefix="oomguard-") as folder:
        options = [f"--journal={folder}", f"--ladder={ladder}"]
        options += ["--module"] * module + ["--resume"] * resume
        command = [sys.executable, "-m", "oomguard.under_guard", *options, "--", *arguments]
        supervised = Run(command, Path(folder), max_restarts)
        status = supervised.supervise()
        return status, supervised.summary(status)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _typed() -> bool:
    """Whether a Ctrl-C in the terminal reaches the script by itself, being in the foreground."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY)
        try:
            return os.tcgetpgrp(terminal) == os.getpgrp()
        finally:
            os.close(terminal)
    except (OSError, AttributeError):  # no terminal, or no such thing on this system
        return False
