"""A training setup, read once: what is in force when training begins, not what a flag says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import trl.trainer.utils
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oomguard.diagnosis import batches as of_batches
from oomguard.diagnosis import weights as of_weights
from oomguard.levers import activations
from oomguard.levers.trl_losses import generates, trl_class
from oomguard.memory import device

if TYPE_CHECKING:
    from oomguard.diagnosis.batches import Batch
    from oomguard.diagnosis.weights import Weight

# TRL's trainers that score tokens with its fused head, without the logits of a whole batch.
_FUSED = frozenset({"SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer"})


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder, as its config has them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class Machine:
    """The CUDA device that training runs on.

    Attributes:
        capability: Its compute capability.
        expandable_segments: Whether PyTorch's allocator uses them.
        others_bytes: What other processes hold of it.
    """

    capability: tuple[int, int] | None
    expandable_segments: bool | None
    others_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that the checks ask about.

    Attributes:
        trainer: The class of the trainer.
        args: Its training arguments.
        trl: The TRL trainer that it is or derives from; `None` for transformers' own.
        model: The class of the model.
        dimensions: Its sizes; `None` where the config does not tell them all.
        weights: Its parameters.
        moments_itemsize: As `weights.moments_itemsize` has it.
        peft: Whether PEFT is around the model.
        quantized: Whether it was loaded in 4 or 8 bits.
        loaded_dtype: The type that its config says it was loaded in.
        itemsize: Bytes of one number in matrix products.
        attention: The attention implementation.
        needs_eager: Whether no other implementation can do what the model or the config asks for.
        causal: Whether it is a causal language model.
        generates: Whether the trainer samples what it trains on.
        caches: Whether forward keeps keys and values for generation.
        checkpointing: Whether activations are recomputed in backward.
        lost_gradients: Whether reentrant checkpoints cut the gradients off: nothing that enters
            them asks for any.
        full_logits: Whether the loss is computed from the logits of all tokens of a batch.
        own_loss: Whether the trainer's loss is the one that the model returns for its labels.
        batches: Batches of training rows; the longest first.
        eval_rows: Rows of the evaluation set.
        eval_width: The longest of them.
        metrics: Whether `compute_metrics` gets all logits of the evaluation set.
        machine: The CUDA device; `None` without.
    """

    trainer: str
    args: Any
    trl: str | None
    model: str
    dimensions: Dimensions | None
    weights: tuple[Weight, ...]
    moments_itemsize: int | None
    peft: bool
    quantized: bool
    loaded_dtype: torch.dtype | None
    itemsize: int
    attention: str | None
    needs_eager: bool
    causal: bool
    generates: bool
    caches: bool
    checkpointing: bool
    lost_gradients: bool
    full_logits: bool
    own_loss: bool
    batches: tuple[Batch, ...]
    eval_rows: int | None
    eval_width: int | None
    metrics: bool
    machine: Machine | None

    @property
    def largest(self) -> Batch | None:
        """The batch with the most tokens of those that were seen."""
        return max(self.batches, key=lambda batch: batch.tokens, default=None)

    @property
    def full_fine_tune(self) -> bool:
        """Whether most of the model's own weights are trained."""
        trained = sum(weight.numel for weight in self.weights if weight.trained)
        return not self.peft and 2 * trained > sum(weight.numel for weight in self.weights)


def read(trainer: Any) -> Setup:
    """The setup of a trainer that is built and not yet trained; nothing of it is changed."""
    model: Any = activations.base_model(trainer)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    args, weights = trainer.args, of_weights.read(trainer)
    rows, width = _evaluation(trainer.eval_dataset)
    causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return Setup(
        trainer=type(trainer).__name__,
        args=args,
        trl=trl_class(trainer),
        model=type(model).__name__,
        dimensions=_dimensions(text),
        weights=weights,
        moments_itemsize=of_weights.moments_itemsize(trainer),
        peft=hasattr(activations.peft_model(trainer), "peft_config"),
        quantized=any(getattr(model, f"is_loaded_in_{n}bit", False) for n in (4, 8)),
        loaded_dtype=getattr(config, "dtype", None),
        itemsize=2 if args.bf16 or args.fp16 else _itemsize(weights),
        attention=getattr(text, "_attn_implementation", None),
        needs_eager=_needs_eager(model, text),
        causal=causal,
        generates=generates(trainer),
        # TRL's trainers ask for no cache with every batch.
        caches=bool(getattr(text, "use_cache", False)) and trl_class(trainer) is None,
        checkpointing=activations.is_checkpointing(trainer),
        lost_gradients=_loses_gradients(trainer, model),
        full_logits=causal and _builds_full_logits(trainer),
        own_loss=type(trainer).compute_loss is Trainer.compute_loss,
        batches=of_batches.read(trainer),
        eval_rows=rows,
        eval_width=width,
        metrics=trainer.compute_metrics is not None
        and trainer.preprocess_logits_for_metrics is None,
        machine=_machine(args.device),
    )


def _dimensions(config: Any) -> Dimensions | None:
    hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if not hidden or not heads:
        return None
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    layers, vocab = (getattr(config, name, None) for name in ("num_hidden_layers", "vocab_size"))
    if not layers or not vocab:
        return None
    return Dimensions(
        layers=layers,
        hidden=hidden,
        intermediate=inner or 4 * hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=vocab,
    )


def _itemsize(weights: tuple[Weight, ...]) -> int:
    own = max(of_weights.base(weights), key=lambda weight: weight.numel, default=None)
    return 4 if own is None else own.dtype.itemsize


def _needs_eager(model: Any, config: Any) -> bool:
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    asked = bool(getattr(config, "output_attentions", False))
    return softcap or asked or not getattr(model, "_supports_sdpa", True)


def _loses_gradients(trainer: Any, model: Any) -> bool:
    if not activations.is_checkpointing(trainer):
        return False
    asked = getattr(trainer.args, "gradient_checkpointing", False)
    if asked and hasattr(model, "activation_checkpointing_enable"):
        return False  # the Trainer enables it by this name, which asks for input gradients too
    kwargs = [getattr(trainer.args, "gradient_checkpointing_kwargs", None) or {}] if asked else []
    functions = [getattr(part, "_gradient_checkpointing_func", None) for part in model.modules()]
    kwargs += [function.keywords for function in functions if isinstance(function, partial)]
    if not any(found.get("use_reentrant", True) for found in kwargs):
        return False
    embedding = model.get_input_embeddings()
    with torch.enable_grad():  # through its hooks, one of which may ask for gradients
        found = embedding(torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device))
    return not found.requires_grad


def _builds_full_logits(trainer: Any) -> bool:
    args, kind = trainer.args, trl_class(trainer)
    if kind is None:
        return not args.use_liger_kernel
    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        chunked = getattr(args, "loss_type", None) == "chunked_nll"
        return not chunked and not args.use_liger_kernel
    if kind == "SFTTrainer":
        smoothed = trainer.label_smoother is not None and args.loss_type == "nll"
        return smoothed or trainer.compute_loss_func is not None
    return kind not in _FUSED


def _evaluation(dataset: Any) -> tuple[int | None, int | None]:
    sets = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    known = [one for one in sets if hasattr(one, "__len__")]
    if not known:
        return None, None
    largest = max(known, key=len)
    return len(largest), of_batches.longest_row(largest)


def _machine(where: torch.device) -> Machine | None:
    if where.type != "cuda":
        return None
    return Machine(
        capability=device.capability(where.index),
        expandable_segments=device.expandable_segments(),
        others_bytes=device.others_bytes(where.index),
    )
