"""The command line: thin; what a command does is in the module of its name."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import oomguard
from oomguard import cli_options as options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

app = typer.Typer(
    name="oomguard",
    help="Finish the fine-tune when CUDA runs out of memory.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class LadderName(StrEnum):
    """The presets of `Ladder.of`."""

    DEFAULT = "default"
    EXACT_FIRST = "exact_first"


# Everything after the script is the script's, also what looks like an option of ours.
_SCRIPT: dict[str, Any] = {"allow_interspersed_args": False, "ignore_unknown_options": False}
Script = Annotated[str, typer.Argument(help="The script; with -m, the name of a module.")]
Arguments = Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")]
Module = Annotated[bool, typer.Option("-m", help="Run a module, as `python -m` does.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"oomguard {oomguard.__version__}\n")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Finish the fine-tune when CUDA runs out of memory."""


def _check_script(script: str, *, module: bool) -> None:
    if not module and not Path(script).exists():
        msg = f"there is no {script}; name a script, or use -m for a module"
        raise typer.BadParameter(msg)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected: a million objects are imported, and looking through them takes long.

    The last look is at the end of the process, which takes a second: what is frozen is left out.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _show(shown: Any, as_json: Callable[[], Any], *, json_: bool) -> None:
    """What a command found: its JSON if asked for, else as `rich` prints it."""
    if json_:
        sys.stdout.write(json.dumps(as_json(), indent=2) + "\n")
    else:
        from rich.console import Console

        Console().print(shown)


@app.command(context_settings=_SCRIPT, no_args_is_help=True)
def run(
    script: Script,
    arguments: Arguments = None,
    *,
    module: Module = False,
    ladder: Annotated[
        LadderName, typer.Option(help="The order in which settings give way.")
    ] = LadderName.DEFAULT,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often a script that died is started again.")
    ] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints of an earlier run.")
    ] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print a JSON object as the last line of stderr.")
    ] = False,
) -> None:
    """Run a training script under the guard, and restart it from its last checkpoint if it dies.

    Output and exit status are the script's.
    """
    from oomguard import supervise

    _check_script(script, module=module)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        msg = (
            f"WORLD_SIZE is {processes}: `oomguard run` supervises one process, and restarting "
            "one of several would leave the others waiting. Start it without torchrun or "
            "accelerate launch"
        )
        raise typer.BadParameter(msg)
    logging.basicConfig(format="oomguard: %(message)s", level=logging.WARNING)
    status, summary = supervise.run(
        [script, *(arguments or ())],
        module=module,
        ladder=ladder.value,
        resume=resume,
        max_restarts=max_restarts,
    )
    if json_:
        sys.stderr.write(json.dumps(summary) + "\n")
    raise typer.Exit(status)


@app.command(no_args_is_help=True)
@options.fine_tune
def estimate(asked: options.FineTune, *, json_: Json = False) -> None:
    """Estimate the peak memory of a fine-tune: no GPU, no weights needed."""
    with options.one_line_errors(), uncollected():
        from oomguard.prediction import command

        found = command.run(asked.model, asked.card, asked.settings())
    _show(found, found.to_dict, json_=json_)


@app.command(context_settings=_SCRIPT, no_args_is_help=True)
def diagnose(
    script: Script,
    arguments: Arguments = None,
    *,
    module: Module = False,
    json_: Json = False,
) -> None:
    """Run a training script up to its training, and say what in its setup wastes memory.

    What the script prints goes to stderr.
    """
    from oomguard.diagnosis.script import diagnose_script

    _check_script(script, module=module)
    with redirect_stdout(sys.stderr):
        found = diagnose_script([script, *(arguments or ())], module=module)
    if found is None:
        sys.stderr.write(f"oomguard: {script} ended without a call of Trainer.train()\n")
        raise typer.Exit(1)
    _show(found, found.to_dict, json_=json_)


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what oomguard finds on this machine, and what each rung would do here."""
    from oomguard.doctor import examine

    findings = examine()
    _show(findings, findings.to_dict, json_=json_)
    raise typer.Exit(0 if findings.healthy else 1)


@app.command(no_args_is_help=True)
@options.fine_tune
def find(
    asked: options.FineTune,
    *,
    maximize: options.MaximizeOption = options.Maximize.TOKENS,
    free: options.Free = "",
    json_: Json = False,
) -> None:
    """Find the largest plan that fits a card, or each size of card: no GPU, no weights needed."""
    with options.one_line_errors(), uncollected():
        from oomguard import find_command

        freed = tuple(name.strip() for name in free.split(",") if name.strip())
        found = find_command.find(
            asked.model,
            asked.card,
            maximize=maximize.value,
            free=freed,
            settings=asked.settings(),
        )
    _show(find_command.as_table(found), lambda: find_command.as_json(found), json_=json_)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="The trainer's output_dir.")],
    *,
    html: Annotated[
        Path | None, typer.Option(help="Where the page goes instead of RUN_DIR/oomguard.html.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the timeline there as a PNG too.")] = None,
    json_: Json = False,
) -> None:
    """Show what happened to a run, and write it as one HTML file that needs no network."""
    from oomguard.report.command import write

    try:
        written = write(run_dir, html, png)
    except (oomguard.OomguardError, OSError) as error:
        sys.stderr.write(f"oomguard: {' '.join(str(error).split())}\n")
        raise typer.Exit(2) from error
    if json_:
        sys.stdout.write(json.dumps(written.to_dict(), indent=2, default=str) + "\n")
    else:
        from rich.console import Console

        Console().print(written)
