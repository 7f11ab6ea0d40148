"""The guard's state in a checkpoint, and how a later run goes on from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from oomguard.errors import ConfigurationError
from oomguard.plan import Plan
from oomguard.report import Recovery

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Reached:
    """How far down the ladder an earlier run had come.

    Attributes:
        initial_plan: The plan that it had started with.
        plan: The plan that it had reached.
        recoveries: What had happened to it.
        loss_form: `SplitLoss.form` where that was measured. Measuring it on another batch may come
            to another end, in 16 bits at least.
    """

    initial_plan: Plan
    plan: Plan
    recoveries: tuple[Recovery, ...] = ()
    loss_form: str | None = None

    def over(self, current: Plan) -> Plan:
        """`current` with what the ladder had changed; what only the user changed stays."""
        changed = {name: after for name, (_, after) in self.initial_plan.changes(self.plan).items()}
        if "target_modules" in changed:
            kept = set(self.plan.target_modules or ())
            frozen = set(self.initial_plan.target_modules or ()) - kept
            targets = tuple(name for name in current.target_modules or () if name not in frozen)
            changed["target_modules"] = targets or None
        return replace(current, **changed)


class OomguardState(TrainerCallback, ExportableState):
    """Has every checkpoint's `trainer_state.json` hold the plan and the recoveries.

    `Trainer` may make it anew from nothing when it resumes, hence what it asks is in the class.
    """

    reached: ClassVar[Callable[[], Reached]]

    @classmethod
    def of(cls, reached: Callable[[], Reached]) -> type[OomguardState]:
        """The callback of one guard, which tells how far it has come."""
        return type(cls.__name__, (cls,), {"reached": staticmethod(reached)})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint of a run without a guard has no entry for the next one to replace."""
        state.stateful_callbacks.setdefault(OomguardState.__name__, self.state())

    def state(self) -> dict[str, Any]:
        """What `read` reads; JSON types."""
        values = json.loads(json.dumps(asdict(type(self).reached())))
        return {"args": {}, "attributes": {"saved": values}}


def read(checkpoint: Path) -> Reached | None:
    """What the checkpoint's run had reached; `None` if no guard was on it.

    Raises:
        ConfigurationError: A guard was, but what it wrote cannot be read.
    """
    path = checkpoint / TRAINER_STATE_NAME
    if not path.is_file():
        return None
    try:
        callbacks = json.loads(path.read_text("utf-8")).get("stateful_callbacks") or {}
        saved = callbacks.get(OomguardState.__name__)
        if saved is None:
            return None
        values = (saved[-1] if isinstance(saved, list) else saved)["attributes"]["saved"]
        return Reached(
            Plan.from_dict(values["initial_plan"]),
            Plan.from_dict(values["plan"]),
            tuple(map(Recovery.from_dict, values["recoveries"])),
            values["loss_form"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        msg = (
            f"{path}: its {OomguardState.__name__} entry is not one that this version of oomguard "
            f"reads ({type(error).__name__}: {error}). Resume with the version that wrote it."
        )
        raise ConfigurationError(msg) from error
