"""What `oomguard estimate` and `oomguard find` ask of a fine-tune, and its names in Python."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

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


Model = Annotated[str, typer.Option(help="A folder, a config.json or the id of a model.")]
QuantizationOption = Annotated[Quantization, typer.Option(help="How the base model is loaded.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the weights that are not quantized.")]
LoraR = Annotated[
    int | None, typer.Option(min=1, help="Rank of the LoRA adapters; 16 if not given.")
]
TargetModules = Annotated[
    str | None, typer.Option(help="Modules with an adapter, with commas; all-linear if not given.")
]
Dora = Annotated[bool, typer.Option("--dora", help="Weight-decomposed LoRA.")]
Rslora = Annotated[bool, typer.Option("--rslora", help="Rank-stabilized LoRA.")]
Full = Annotated[bool, typer.Option("--full", help="Train all weights instead of adapters.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows of one pass.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of the longest row.")]
GradientCheckpointing = Annotated[
    bool | None, typer.Option(help="Recompute activations; on for --trainer sft.")
]
Optim = Annotated[str, typer.Option(help="The optimizer, as in TrainingArguments.")]
Attn = Annotated[Attention, typer.Option(help="The attention implementation.")]
Padded = Annotated[bool, typer.Option("--padded", help="Rows of a batch differ in length.")]
TrainerOption = Annotated[TrainerName, typer.Option(help="TRL's SFTTrainer, or a plain Trainer.")]
MaximizeOption = Annotated[Maximize, typer.Option(help="What to make as large as fits.")]
Free = Annotated[
    str, typer.Option(help="Settings that may change besides, with commas: see find_plan.")
]
Card = Annotated[str | None, typer.Option(help="A size such as 12GiB, or a name: RTX 4090.")]


def as_settings(
    *,
    quantization: Quantization,
    dtype: Dtype,
    lora_r: int | None,
    target_modules: str | None,
    dora: bool,
    rslora: bool,
    full: bool,
    batch_size: int,
    max_length: int,
    gradient_checkpointing: bool | None,
    optim: str,
    attn: Attention,
    padded: bool,
    trainer: TrainerName,
) -> dict[str, Any]:
    """The options as keyword arguments of `estimate` and `find_plan`.

    Raises:
        ConfigurationError: A full fine-tune is asked for along with adapters.
    """
    from oomguard.errors import ConfigurationError

    named = {"--lora-r": lora_r, "--target-modules": target_modules, "--dora": dora}
    adapters = [name for name, value in (named | {"--rslora": rslora}).items() if value]
    if full and adapters:
        msg = f"--full trains all weights, and {adapters[0]} asks for adapters: leave out one"
        raise ConfigurationError(msg)
    settings: dict[str, Any] = {
        "quantization": quantization.value,
        "dtype": dtype.value,
        "lora_r": None,
        "per_device_train_batch_size": batch_size,
        "max_length": max_length,
        "optim": optim,
        "attn_implementation": attn.value,
        "padded": padded,
        "trainer": trainer.value,
        "use_dora": dora,
        "use_rslora": rslora,
    }
    if not full:
        names = [name.strip() for name in (target_modules or ALL_LINEAR).split(",")]
        settings |= {
            "lora_r": lora_r or 16,
            "target_modules": tuple(name for name in names if name) or (ALL_LINEAR,),
        }
    if gradient_checkpointing is not None:
        settings["gradient_checkpointing"] = gradient_checkpointing
    return settings


@contextmanager
def one_line_errors() -> Iterator[None]:
    """While entered, what cannot be done ends the command with one line and exit status 2."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which CPU kernels it lacks
    from oomguard.errors import ConfigurationError

    try:
        yield
    except ConfigurationError as error:
        typer.echo(f"oomguard: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
