"""What `oomguard estimate` and `oomguard find` ask of a fine-tune, and its names in Python."""

from __future__ import annotations

import functools
import inspect
import logging
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer import Option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL_LINEAR = "all-linear"


class Quantization(StrEnum):
    """As `Settings.quantization`."""

    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"
    NONE = "none"


class Dtype(StrEnum):
    """As `Settings.dtype`."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Attention(StrEnum):
    """As `Settings.attn_implementation`."""

    SDPA = "sdpa"
    EAGER = "eager"


class TrainerName(StrEnum):
    """As `Settings.trainer`."""

    SFT = "sft"
    TRAINER = "trainer"


class Maximize(StrEnum):
    """What `find_plan` maximizes without a GPU."""

    TOKENS = "tokens"
    MAX_LENGTH = "max_length"
    MICRO_BATCH_SIZE = "micro_batch_size"
    LORA_R = "lora_r"


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """The options, which `fine_tune` gives to a command."""

    model: Annotated[str, Option(help="A folder, a config.json or the id of a model.")]
    quantization: Annotated[Quantization, Option(help="How the base model is loaded.")] = (
        Quantization.NONE
    )
    dtype: Annotated[Dtype, Option(help="Of the weights that are not quantized.")] = Dtype.BFLOAT16
    lora_r: Annotated[
        int | None, Option(min=1, help="Rank of the LoRA adapters; 16 if not given.")
    ] = None
    target_modules: Annotated[
        str | None, Option(help="Modules with an adapter, with commas; all-linear if not given.")
    ] = None
    dora: Annotated[bool, Option("--dora", help="Weight-decomposed LoRA.")] = False
    rslora: Annotated[bool, Option("--rslora", help="Rank-stabilized LoRA.")] = False
    full: Annotated[bool, Option("--full", help="Train all weights instead of adapters.")] = False
    batch_size: Annotated[int, Option(min=1, help="Rows of one pass.")] = 1
    max_length: Annotated[int, Option(min=1, help="Tokens of the longest row.")] = 1024
    gradient_checkpointing: Annotated[
        bool | None, Option(help="Recompute activations; on for --trainer sft.")
    ] = None
    optim: Annotated[str, Option(help="The optimizer, as in TrainingArguments.")] = (
        "adamw_torch_fused"
    )
    attn: Annotated[Attention, Option(help="The attention implementation.")] = Attention.SDPA
    padded: Annotated[bool, Option("--padded", help="Rows of a batch differ in length.")] = False
    trainer: Annotated[TrainerName, Option(help="TRL's SFTTrainer, or a plain Trainer.")] = (
        TrainerName.SFT
    )
    card: Annotated[str | None, Option(help="A size such as 12GiB, or a name: RTX 4090.")] = None

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `estimate` and `find_plan`.

        Raises:
            ConfigurationError: A full fine-tune is asked for along with adapters.
        """
        from oomguard.errors import ConfigurationError

        asked = {"--lora-r": self.lora_r, "--target-modules": self.target_modules}
        asked |= {"--dora": self.dora, "--rslora": self.rslora}
        adapters = [name for name, value in asked.items() if value]
        if self.full and adapters:
            msg = f"--full trains all weights, and {adapters[0]} asks for adapters: leave out one"
            raise ConfigurationError(msg)
        settings: dict[str, Any] = {
            "quantization": self.quantization.value,
            "dtype": self.dtype.value,
            "lora_r": None,
            "per_device_train_batch_size": self.batch_size,
            "max_length": self.max_length,
            "optim": self.optim,
            "attn_implementation": self.attn.value,
            "padded": self.padded,
            "trainer": self.trainer.value,
            "use_dora": self.dora,
            "use_rslora": self.rslora,
        }
        if not self.full:
            names = [name.strip() for name in (self.target_modules or ALL_LINEAR).split(",")]
            settings |= {
                "lora_r": self.lora_r or 16,
                "target_modules": tuple(name for name in names if name) or (ALL_LINEAR,),
            }
        if self.gradient_checkpointing is not None:
            settings["gradient_checkpointing"] = self.gradient_checkpointing
        return settings


def fine_tune(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which takes a `FineTune` first, its options in that place."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    hints = get_type_hints(FineTune, include_extras=True)
    given = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(FineTune)
    ]

    def with_options(**values: Any) -> None:
        made = FineTune(**{one.name: values.pop(one.name) for one in given})
        command(made, **values)

    functools.update_wrapper(with_options, command)
    parameters = [*given, *own]
    vars(with_options)["__signature__"] = inspect.Signature(parameters)
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options


MaximizeOption = Annotated[Maximize, Option(help="What to make as large as fits.")]
Free = Annotated[str, Option(help="Settings that may change besides, with commas: see find_plan.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """While entered, what cannot be done ends the command with one line and exit status 2."""
    from huggingface_hub.utils import logging as hub_logging

    from oomguard.errors import ConfigurationError

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which CPU kernels it lacks
    hub_logging.set_verbosity_error()  # how often it tries a hub that cannot be reached

    try:
        yield
    except ConfigurationError as error:
        typer.echo(f"oomguard: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
