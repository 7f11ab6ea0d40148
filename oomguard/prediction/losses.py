"""The loss of a live trainer, where it is not what a plain Trainer or TRL has by default."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    import torch

_KNOWN = ("transformers", "trl", "oomguard")


@dataclass(frozen=True)
class Loss:
    """How a loss is made.

    Attributes:
        loss_type: As in `SFTConfig`.
        smoother: What `label_smoothing_factor` makes; `None` without it.
        own: Whose loss is not traced: `cross_entropy` of full logits is counted for it.
        in_place: Whether `own` stands in place of `compute_loss`, and not inside of it.
        pops: Whether it takes the labels out of the inputs; else the model has a loss too.
    """

    loss_type: str = "nll"
    smoother: Any = None
    own: str | None = None
    in_place: bool = False
    pops: bool = True

    @classmethod
    def of(cls, trainer: Any) -> Loss:
        """That of a live trainer."""
        given, names = getattr(trainer, "compute_loss_func", None), _names_used(trainer)
        own = None if names is None else f"compute_loss of {type(trainer).__name__}"
        if given is not None and own is None:
            own = f"compute_loss_func={getattr(given, '__name__', type(given).__name__)}"
        return cls(
            loss_type=getattr(trainer.args, "loss_type", "nll"),
            smoother=getattr(trainer, "label_smoother", None),
            own=own,
            in_place=names is not None,
            pops=names is None or "pop" in names,
        )

    def of_logits(self, model: Any, inputs: dict[str, Any], items: Any) -> Any:
        """The loss of a plain Trainer."""
        if self.own is None and self.smoother is None:
            return model(**inputs, num_items_in_batch=items)["loss"]
        labels = inputs["labels"]
        if self.pops:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        if self.own is not None:
            return shifted(outputs, labels)
        return self.smoother(outputs, labels, shift_labels=True)


def shifted(outputs: Any, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    """The loss as most code of users has it: of a copy of the logits, in float32."""
    logits = outputs.logits[:, :-1].contiguous().float()
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def _names_used(trainer: Any) -> tuple[str, ...] | None:
    """What a `compute_loss` of the user's names, if it asks no other; `None` where it is known."""
    for owner in (trainer, *type(trainer).__mro__):
        method = vars(owner).get("compute_loss")
        if method is None or _package(owner) == "oomguard":
            continue
        code = getattr(inspect.unwrap(method), "__code__", None)
        names: tuple[str, ...] = getattr(code, "co_names", ())
        return None if _package(method) in _KNOWN or "compute_loss" in names else names
    return None


def _package(what: Any) -> str:
    return str(getattr(what, "__module__", "")).partition(".")[0]
