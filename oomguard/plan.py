"""The memory-relevant settings of a training run, as one frozen value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from oomguard.errors import ConfigurationError

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "micro_batch_size",
    "max_pass_tokens",
    "max_length",
    "lora_r",
)
_REQUIRED = _AT_LEAST_ONE[:3]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is in force, spelled as in `TrainingArguments`, `SFTConfig` and `LoraConfig`.

    A rung answers with a new plan; levers make the live trainer obey it. The effective batch size
    is the same in every plan of a run.

    Attributes:
        per_device_train_batch_size: Rows that the data loader puts into one batch.
        gradient_accumulation_steps: Batches of one optimizer step.
        world_size: Processes that train together.
        micro_batch_size: Rows of one forward and backward pass when a batch is as long as the one
            that failed. `None`: a loaded batch is one pass.
        max_pass_tokens: Padded tokens (rows x width) that one pass may hold; shorter batches
            therefore stay whole. `None`: no limit.
        max_length: Tokens of the longest row that is trained on. `None`: no limit.
        sequence_mode: How longer rows are cut, `"windows"` or `"truncate"`. `None`: by the kind of
            loss.
        gradient_checkpointing: Whether activations are recomputed in backward.
        offload_activations: Whether what checkpointing keeps is held in the host's memory.
        optim: The optimizer, as `TrainingArguments.optim` names it.
        target_modules: Modules with a trained LoRA adapter, those with the most adapter parameters
            first. `None`: no LoRA.
        lora_r: The largest LoRA rank. `None`: no LoRA.
        cache_released_step: The last optimizer step that was tried again for the sole reason that
            the allocator's cache was large.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int = 1
    world_size: int = 1
    micro_batch_size: int | None = None
    max_pass_tokens: int | None = None
    max_length: int | None = None
    sequence_mode: str | None = None
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    optim: str | None = None
    target_modules: tuple[str, ...] | None = None
    lora_r: int | None = None
    cache_released_step: int | None = None

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is None and name not in _REQUIRED:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                msg = f"Plan.{name} is {value!r}; it must be a whole number of 1 or more."
                raise ConfigurationError(msg)
        if self.sequence_mode not in {None, "windows", "truncate"}:
            msg = f"Plan.sequence_mode is {self.sequence_mode!r}; use 'windows' or 'truncate'."
            raise ConfigurationError(msg)
        if isinstance(self.target_modules, str):
            msg = f"Plan.target_modules is {self.target_modules!r}; give a tuple of names."
            raise ConfigurationError(msg)

    @property
    def effective_batch_size(self) -> int:
        """Rows that one optimizer step trains on; equal in all plans of a run."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def passes_per_step(self) -> int:
        """Forward and backward passes of one optimizer step of full-length batches, per process."""
        passes = -(-self.per_device_train_batch_size // self.rows_per_pass)
        return self.gradient_accumulation_steps * passes

    @property
    def rows_per_pass(self) -> int:
        """Rows of one forward and backward pass of a full-length batch."""
        return self.micro_batch_size or self.per_device_train_batch_size

    def changes(self, other: Plan) -> dict[str, tuple[Any, Any]]:
        """Settings that differ in `other`, as `{name: (here, there)}`."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def describe_change(self, after: Plan) -> str:
        """The step from here to `after` in words, as in `8 x 4 -> 4 x 8 passes`."""
        parts = []
        changed = self.changes(after)
        if self._passes() != after._passes():
            parts.append(f"{self._passes()} -> {after._passes()} passes")
            changed.pop("max_pass_tokens", None)
        elif "max_length" in changed:
            changed.pop("max_pass_tokens", None)
        for name, (here, there) in changed.items():
            if name == "target_modules" and here is not None and there is not None:
                parts.append(f"adapters of {', '.join(n for n in here if n not in there)} frozen")
            elif name == "cache_released_step":
                parts.append("cache released")
            elif name not in {"micro_batch_size", "sequence_mode"}:
                parts.append(f"{name} {_text(here)} -> {_text(there)}")
        return ", ".join([*parts, f"effective batch {after.effective_batch_size} unchanged"])

    def _passes(self) -> str:
        return f"{self.rows_per_pass} x {self.passes_per_step}"

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        values = asdict(self)
        if self.target_modules is not None:
            values["target_modules"] = list(self.target_modules)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan that `to_dict` wrote."""
        names = values.get("target_modules")
        return cls(**{**values, "target_modules": None if names is None else tuple(names)})


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unlimited" if value is None else str(value)
