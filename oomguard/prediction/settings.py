"""What decides the memory of a fine-tune besides its plan, as one frozen value."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from oomguard.errors import ConfigurationError

if TYPE_CHECKING:
    from oomguard.plan import Plan

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "quantization": ("none", "nf4", "fp4", "int8"),
    "dtype": ("bfloat16", "float16", "float32"),
    "mixed_precision": (None, "no", "bf16", "fp16"),
    "attn_implementation": ("sdpa", "eager"),
    "trainer": ("sft", "trainer"),
}
_KBIT = ("nf4", "fp4", "int8")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of model, adapter and trainer that no lever changes; the rest is a `Plan`.

    Attributes:
        quantization: How the base is loaded: `"none"`, or bitsandbytes' `"nf4"`, `"fp4"`, `"int8"`.
        double_quant: `bnb_4bit_use_double_quant`; without effect unless the base is 4-bit.
        dtype: Of the weights that are not quantized, as `from_pretrained(dtype=…)`.
        mixed_precision: `"bf16"` or `"fp16"` autocast, or `"no"`. `None`: what the trainer takes by
            itself, bf16 for TRL's SFT (fp16 on a float16 base), none for a plain Trainer.
        lora_dropout: As in `LoraConfig`.
        use_rslora: As in `LoraConfig`; the memory is the same.
        use_dora: As in `LoraConfig`.
        attn_implementation: `"sdpa"` or `"eager"`.
        padded: Whether rows of a batch differ in length, so that a padding mask is in force.
        packing: Whether rows are packed to `max_length` without padding, documents told apart by
            their positions.
        target_share: Of the tokens that a pass predicts, how many are trained on: less than 1 with
            padding, or where prompts are masked. TRL's head leaves the others out.
        trainer: `"sft"`, TRL's SFTTrainer with its chunked language-model head, or `"trainer"`, a
            plain Trainer with full logits.
        checkpoint_every_n_layers: With checkpointing on, how many layers share one checkpoint.
        use_reentrant: The form of checkpointing, as in `gradient_checkpointing_kwargs`.
        input_require_grads: Whether the embeddings' output requires gradients, as after
            `model.enable_input_require_grads()`. `None`: where it is needed, for adapters under
            checkpointing.
        expandable_segments: Whether `PYTORCH_ALLOC_CONF` has `expandable_segments:True`.
        prepare_for_kbit: Whether the user calls PEFT's `prepare_model_for_kbit_training`, which
            makes float32 of every weight that is not quantized.
        max_grad_norm: As in `TrainingArguments`; 0 clips nothing.
    """

    quantization: str = "none"
    double_quant: bool = True
    dtype: str = "bfloat16"
    mixed_precision: str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    attn_implementation: str = "sdpa"
    padded: bool = False
    packing: bool = False
    target_share: float = 1.0
    trainer: str = "sft"
    checkpoint_every_n_layers: int = 1
    use_reentrant: bool = False
    input_require_grads: bool | None = None
    expandable_segments: bool = False
    prepare_for_kbit: bool = False
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                said = ", ".join(map(repr, choices))
                msg = f"{name} is {getattr(self, name)!r}; it must be one of {said}"
                raise ConfigurationError(msg)
        every = self.checkpoint_every_n_layers
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            msg = f"checkpoint_every_n_layers is {every!r}; it must be a whole number of 1 or more"
            raise ConfigurationError(msg)
        if not 0.0 < self.target_share <= 1.0:
            msg = f"target_share is {self.target_share!r}; it must be above 0 and at most 1"
            raise ConfigurationError(msg)
        if not 0.0 <= self.lora_dropout < 1.0:
            msg = f"lora_dropout is {self.lora_dropout!r}; it must be at least 0 and below 1"
            raise ConfigurationError(msg)
        if self.padded and self.packing:
            msg = "padded and packing exclude each other: packed rows have no padding"
            raise ConfigurationError(msg)
        if self.prepare_for_kbit and not self.is_quantized:
            msg = (
                "prepare_for_kbit is for quantized bases, and quantization is 'none': "
                "(a) quantize, or (b) leave prepare_for_kbit out"
            )
            raise ConfigurationError(msg)

    @property
    def is_quantized(self) -> bool:
        """Whether the base is held in 4 or 8 bits."""
        return self.quantization in _KBIT

    @property
    def autocast(self) -> str:
        """The mixed precision in force: `"no"`, `"bf16"` or `"fp16"`."""
        if self.mixed_precision is not None:
            return self.mixed_precision
        if self.trainer == "trainer":
            return "no"
        return "fp16" if self.dtype == "float16" else "bf16"

    def check(self, plan: Plan) -> None:
        """Refuse what contradicts `plan`.

        Raises:
            ConfigurationError: Together they cannot be trained.
        """
        if (plan.lora_r is None) != (plan.target_modules is None):
            msg = (
                f"lora_r is {plan.lora_r} and target_modules is {plan.target_modules}: LoRA needs "
                "both, a full fine-tune neither"
            )
            raise ConfigurationError(msg)
        full = plan.lora_r is None
        if full and self.is_quantized:
            msg = (
                f"a base in {self.quantization} cannot be trained whole: (a) train LoRA adapters "
                "(lora_r=16), or (b) load it unquantized (quantization='none')"
            )
            raise ConfigurationError(msg)
        if full and (self.use_dora or self.use_rslora or self.lora_dropout):
            msg = "use_dora, use_rslora and lora_dropout belong to LoRA: give lora_r, or drop them"
            raise ConfigurationError(msg)
        if full and self.dtype == "float16" and self.autocast == "fp16":
            msg = (
                "fp16 training cannot unscale float16 gradients: (a) load in float32, (b) use "
                "bfloat16, or (c) train LoRA adapters"
            )
            raise ConfigurationError(msg)
        if self.checkpoint_every_n_layers > 1 and not plan.gradient_checkpointing:
            msg = "checkpoint_every_n_layers needs gradient_checkpointing=True"
            raise ConfigurationError(msg)
        if plan.offload_activations and not plan.gradient_checkpointing:
            msg = "offload_activations moves checkpoints: it needs gradient_checkpointing=True"
            raise ConfigurationError(msg)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return asdict(self)

    @classmethod
    def names(cls) -> frozenset[str]:
        """The names of all settings."""
        return frozenset(field.name for field in fields(cls))


def check_trl() -> None:
    """Refuse a TRL whose SFTTrainer makes its loss in a way that is not modelled.

    Raises:
        ConfigurationError: The installed TRL has no fused language-model head.
    """
    from trl.trainer import utils

    if not hasattr(utils, "add_fused_lm_head"):
        msg = (
            f"SFTTrainer of trl {version('trl')} makes all logits at once, which estimates do not "
            "model; install trl 1.16 or newer, or ask for trainer='trainer'"
        )
        raise ConfigurationError(msg)
