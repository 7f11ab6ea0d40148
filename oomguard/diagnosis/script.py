"""Diagnose the trainer of an unchanged script: run the script up to its `train()`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Never

from oomguard.under_guard import TRAINER_MODULE, AfterImport, from_script, run_script

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from oomguard.diagnosis.finding import Diagnosis


class Diagnosed(SystemExit):
    """Ends a script in the place of its training.

    Attributes:
        diagnosis: What was found.
    """

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(0)
        self.diagnosis = diagnosis


def diagnose_script(script: Sequence[str], *, module: bool = False) -> Diagnosis | None:
    """Run `script` as Python would, until it calls `Trainer.train`.

    Args:
        script: Its path and arguments; with `module`, the name of a module and arguments.
        module: Whether to run a module, as `python -m` does.

    Returns:
        The diagnosis of the first trainer that is trained; `None` where none is.

    Raises:
        SystemExit: The script ended with an exit status other than 0, or with an error, which has
            been shown.
    """

    def diagnose_trainings(transformers_trainer: ModuleType) -> None:
        transformers_trainer.Trainer.train = _diagnose

    sys.meta_path.insert(0, AfterImport(TRAINER_MODULE, diagnose_trainings))
    try:
        run_script(script, module=module)
    except Diagnosed as end:
        return end.diagnosis
    except SystemExit as end:
        if end.code:
            raise
    except Exception as error:  # noqa: BLE001 - shown as Python shows it
        trace = from_script(error.__traceback__, __file__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)
    return None


def _diagnose(trainer: Any, *args: Any, **kwargs: Any) -> Never:
    from oomguard.diagnosis.diagnose import diagnose

    raise Diagnosed(diagnose(trainer))
