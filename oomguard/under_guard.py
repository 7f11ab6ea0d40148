"""The process of a supervised script: run it as Python would, its `Trainer.train` guarded.

Nothing but the standard library is imported before the script does: scripts set environment
variables first that transformers and torch read on import.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib.util
import io
import os
import runpy
import signal
import sys
import zipfile
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from oomguard.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import TracebackType

TRAINER_MODULE = "transformers.trainer"


class AfterImport(MetaPathFinder):
    """Calls `action` with one module, right after that has been imported."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        """Wait for the module `name`; put into `sys.meta_path` by the caller."""
        self._name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with `action` at the end of its loading."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            self._action(module)

        spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m oomguard.under_guard")
    parser.add_argument("--journal", required=True)
    parser.add_argument("--ladder", default="default")
    parser.add_argument("--module", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("script", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    script = options.script[1:]  # after "--"
    journal = Journal(options.journal)

    def guard_trainings(module: ModuleType) -> None:
        trainer_class = module.Trainer
        original = trainer_class.train

        @functools.wraps(original)
        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            return trainings(options, journal).train(original, trainer, *args, **kwargs)

        trainer_class.train = train

    sys.meta_path.insert(0, AfterImport(TRAINER_MODULE, guard_trainings))
    try:
        run_script(script, module=options.module)
    except SystemExit as error:
        stopped = error.code == 128 + signal.SIGTERM
        journal.end("stopped" if stopped else "final", f"SystemExit: {error}")
        raise
    except KeyboardInterrupt:
        journal.end("stopped", "KeyboardInterrupt")
        raise
    except Exception as error:  # noqa: BLE001 - shown as Python shows it, and told the supervisor
        text = str(error).strip().split("\n")[0]
        journal.end(kind_of(error), f"{type(error).__name__}: {text}")
        trace = from_script(error.__traceback__, __file__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)


_trainings: list[Any] = []


def trainings(options: argparse.Namespace, journal: Journal) -> Any:
    """The one `GuardedTrainings` of this process; made when it is first needed."""
    if not _trainings:
        from oomguard.guarded_train import GuardedTrainings

        _trainings.append(GuardedTrainings(journal, options.ladder, resume=options.resume))
    return _trainings[0]


def run_script(script: Sequence[str], *, module: bool) -> None:
    """Run a script as `python script args` does, or a module as `python -m module args` does."""
    sys.argv[:] = script
    if module:
        runpy.run_module(script[0], run_name="__main__", alter_sys=True)
        return
    path = Path(script[0])
    if not sys.flags.safe_path:
        # `-m` has put the working directory first; a folder or zip file is put there by runpy.
        sys.path[:1] = [str(path.resolve().parent)] if path.is_file() else []
    if path.is_dir() or path.suffix == ".pyc" or zipfile.is_zipfile(path):
        runpy.run_path(script[0], run_name="__main__")
        return
    # runpy would make either argv[0] absolute or __file__ relative.
    name = os.path.join(Path.cwd(), script[0])  # noqa: PTH118 - with any "./", as Python has it
    main_module = ModuleType("__main__")
    main_module.__dict__.update(__file__=name, __builtins__=builtins)
    sys.modules["__main__"] = main_module
    with io.open_code(name) as file:
        code = compile(file.read(), name, "exec")
    exec(code, main_module.__dict__)  # noqa: S102 - it is what we were asked to run


def kind_of(error: Exception) -> str:
    """How a script that this error ends is to be judged, as in `Death.kind`."""
    own = sys.modules.get("oomguard.errors")
    if own is not None and isinstance(error, own.OomguardError):
        return "final"
    if "torch" in sys.modules and isinstance(error, RuntimeError):
        from oomguard.memory import device

        return "cuda" if device.is_lost() else "crash"
    return "crash"


def from_script(trace: TracebackType | None, caller: str) -> TracebackType | None:
    """The part of a traceback that begins in the script, which the file `caller` runs."""
    ours = {caller, __file__, runpy.__file__, "<frozen runpy>"}
    frame = trace
    while frame is not None and frame.tb_frame.f_code.co_filename in ours:
        frame = frame.tb_next
    return frame or trace


if __name__ == "__main__":
    main()
