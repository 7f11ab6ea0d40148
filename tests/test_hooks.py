"""The points at which a Trainer is intercepted, and the names there that upstream must keep."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import bitsandbytes.autograd._functions
import peft
import peft.tuners.lora.dora
import pytest
import torch
import trl.trainer.base_trainer
from accelerate.data_loader import DataLoaderShard
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Seq2SeqTrainer,
    Trainer,
    masking_utils,
    modeling_utils,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

import oomguard
from oomguard.hooks import GuardedTrainer
from oomguard.levers.merged_metrics import _MASKED_ENTROPY
from oomguard.levers.tokens import counted_in_the_loop
from oomguard.watch.readings import Reading
from tests import tiny
from tests.upstream import source

if TYPE_CHECKING:
    from collections.abc import Callable


def overridden() -> list[str]:
    return [name for name, value in vars(GuardedTrainer).items() if inspect.isfunction(value)]


@pytest.mark.parametrize("upstream", [Trainer, Seq2SeqTrainer, SFTTrainer])
@pytest.mark.parametrize("name", overridden())
def test_an_intercepted_method_is_called_upstream_as_the_guard_expects(
    name: str, upstream: type
) -> None:
    if name == "_track_num_input_tokens" and counted_in_the_loop():
        assert not hasattr(upstream, name)
        return
    assert hasattr(upstream, name), f"{upstream.__name__}.{name} is gone: see hooks.{name}"
    ours = inspect.signature(getattr(GuardedTrainer, name)).parameters
    theirs = inspect.signature(getattr(upstream, name)).parameters
    if any({"args", "kwargs"} <= parameters.keys() for parameters in (ours, theirs)):
        return  # passed on as they are
    said = f"{upstream.__name__}.{name}{tuple(theirs)}, hooks.py has {tuple(ours)}"
    assert list(theirs) == list(ours), said
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        assert (mine.default is mine.empty) == (other.default is other.empty), said


# Private names of other packages that oomguard uses, each with a check that it still means the
# same there. `testing` is left out: its own tests run every one of them.
OLDER_TRL = not hasattr(DPOTrainer, "_compute_loss")  # whose other trainers are not split
ATEN = torch.ops.aten
# Transformers 4 does not offload, and has no name of its own for it.
OFFLOADS = (
    modeling_utils
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else torch.autograd.graph
)
MAKES_CONFIG: Any = LlamaConfig
ONE = torch.ones(1)
SDPA = ("query", "key", "value")


def begins_with(op: Any, *names: str) -> bool:
    """Whether these are the first arguments of an operator."""
    return [argument.name for argument in op.default._schema.arguments][: len(names)] == list(names)


PRIVATE: dict[str, Callable[[], Any]] = {
    "_is_view": lambda: ONE.view(1)._is_view() and not ONE._is_view(),
    "_BatchNorm": lambda: issubclass(nn.BatchNorm2d, nn.modules.batchnorm._BatchNorm),
    "_C": lambda: isinstance(torch._C.DisableTorchFunctionSubclass, type),
    "_ForceDispatchKeyGuard": lambda: dispatches_as_before(),
    "_attn_implementation": lambda: (
        MAKES_CONFIG(attn_implementation="eager")._attn_implementation == "eager"
    ),
    "_buffers": lambda: "running_mean" in nn.BatchNorm1d(1)._buffers,
    "_cdata": lambda: (
        ONE.untyped_storage()._cdata == ONE.view(1, 1).untyped_storage()._cdata
        and ONE.untyped_storage()._cdata != ONE.clone().untyped_storage()._cdata
    ),
    "_local_scalar_dense": lambda: ATEN._local_scalar_dense(ONE) == 1.0,
    "_safe_softmax": lambda: begins_with(ATEN._safe_softmax, "self", "dim"),
    "_softmax_backward_data": lambda: begins_with(
        ATEN._softmax_backward_data, "grad_output", "output"
    ),
    "_scaled_dot_product_attention_math": lambda: begins_with(
        ATEN._scaled_dot_product_attention_math, *SDPA, "attn_mask", "dropout_p"
    ),
    "_scaled_dot_product_efficient_attention": lambda: begins_with(
        ATEN._scaled_dot_product_efficient_attention, *SDPA, "attn_bias", "compute_log_sumexp"
    ),
    "_scaled_dot_product_efficient_attention_backward": lambda: begins_with(
        ATEN._scaled_dot_product_efficient_attention_backward, "grad_out_", *SDPA
    ),
    "_scaled_dot_product_flash_attention": lambda: begins_with(
        ATEN._scaled_dot_product_flash_attention, *SDPA, "dropout_p", "is_causal"
    ),
    "_scaled_dot_product_flash_attention_backward": lambda: begins_with(
        ATEN._scaled_dot_product_flash_attention_backward, "grad_out", *SDPA, "out", "logsumexp"
    ),
    "_supports_sdpa": lambda: LlamaForCausalLM._supports_sdpa is True,
    "_asdict": lambda: TrainOutput(1, 2.0, {})._asdict()["global_step"] == 1,
    "_dispatch_tls_local_exclude_set": lambda: dispatches_as_before(),
    "_dispatch_tls_local_include_set": lambda: dispatches_as_before(),
    "_disable_current_modes": lambda: sees_nothing(_disable_current_modes()),
    "_get_current_dispatch_mode_stack": lambda: _get_current_dispatch_mode_stack() == [],
    "_entropy_bonus_enabled": lambda: (
        OLDER_TRL or ("self._entropy_bonus_enabled =" in inspect.getsource(GRPOTrainer.__init__))
    ),
    "_fields": lambda: Reading._fields[:2] == ("step", "time_s"),
    "_get_collator_with_removed_columns": lambda: (
        parameters(Trainer._get_collator_with_removed_columns) == ["data_collator", "description"]
    ),
    "_get_output_dir": lambda: (
        list(inspect.signature(Trainer._get_output_dir).parameters) == ["self", "trial"]
    ),
    "_forward_hooks": lambda: len(nn.Linear(1, 1)._forward_hooks) == 0,
    "_indices": lambda: torch.eye(2).to_sparse()._indices().shape == (2, 2),
    "_gradient_checkpointing_func": lambda: checkpoints_by_partial(),
    "_current_frames": lambda: inspect.currentframe() in sys._current_frames().values(),
    "_is_profiler_enabled": lambda: is_told_while_profiling(),
    "_is_vision_dataset": lambda: (
        OLDER_TRL
        or all(
            "self._is_vision_dataset =" in inspect.getsource(trainer.__init__)
            for trainer in (DPOTrainer, KTOTrainer)
        )
    ),
    "_metrics": lambda: "self._metrics[mode]" in inspect.getsource(SFTTrainer.compute_loss),
    "_non_blocking": lambda: "_non_blocking" in inspect.signature(DataLoaderShard).parameters,
    "_per_optimizer_states": lambda: torch.amp.GradScaler("cpu")._per_optimizer_states == {},
    "_record_memory_history": lambda: (
        {"enabled", "stacks"}
        <= inspect.signature(torch.cuda.memory._record_memory_history).parameters.keys()
    ),
    "_schema": lambda: (
        torch.ops.aten.add_.Tensor._schema.is_mutable
        and not torch.ops.aten.add.Tensor._schema.is_mutable
    ),
    "_values": lambda: torch.eye(2).to_sparse()._values().tolist() == [1, 1],
    "_snapshot": lambda: callable(torch.cuda.memory._snapshot),
}


def parameters(method: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(method).parameters)[1:]


def checkpoints_by_partial() -> bool:
    model: Any = tiny.llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    function = model.model.layers[0]._gradient_checkpointing_func
    return isinstance(function, functools.partial) and function.keywords["use_reentrant"]


def dispatches_as_before() -> bool:
    found = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ForceDispatchKeyGuard(*found):
        return (torch.ones(1, requires_grad=True) * 2).requires_grad


def is_told_while_profiling() -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        inside = torch.autograd.profiler._is_profiler_enabled
    return inside and not torch.autograd.profiler._is_profiler_enabled


def sees_nothing(context: Any) -> bool:
    class Sees(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(
            self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    with Sees() as mode:
        torch.zeros(1)
        with context:
            torch.zeros(1)
    return bool(mode.seen == 1)


def private_names() -> set[str]:
    """Names with a leading underscore that oomguard uses and gives to nothing of its own."""
    used, own = set(overridden()), set(overridden())
    for path in Path(oomguard.__file__).parent.rglob("*.py"):
        tree = ast.parse("" if path.stem == "testing" else path.read_text("utf-8"))
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    own.add(name)
                case ast.Attribute(attr=name, ctx=ctx) | ast.Name(id=name, ctx=ctx):
                    (own if isinstance(ctx, ast.Store) else used).add(name)
                case ast.alias(name=name):
                    used.add(name)
                case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, name, *_]):
                    used.add(str(ast.literal_eval(name)) if isinstance(name, ast.Constant) else "")
    return {name for name in used - own if name.startswith("_") and not name.endswith("__")}


def test_every_private_name_of_another_package_is_guarded_here() -> None:
    assert private_names() == PRIVATE.keys(), "add a check to PRIVATE, or remove one"


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_of_another_package_means_what_it_did(name: str) -> None:
    assert PRIVATE[name](), f"{name} has moved: grep it in oomguard/"


UPSTREAM: dict[str, tuple[Any, str]] = {
    "loss._loss": (Trainer, "_prepare_inputs"),
    "activations.put_back": (
        PreTrainedModel,
        "is_activation_checkpointing|is_gradient_checkpointing",
    ),
    "loss.refusal names it": (trl.trainer.base_trainer, "_BaseTrainer|BaseTrainer"),
    "activations.enable": (
        PreTrainedModel,
        "activation_checkpointing_enable|enable_input_require_grads",
    ),
    "activations.refusal": (PreTrainedModel, "supports_gradient_checkpointing"),
    "activations.is_checkpointing": (GradientCheckpointingLayer, "gradient_checkpointing"),
    "activations.base_model": (peft.PeftModel, "get_base_model"),
    "activations.refuses_offload": (
        PreTrainedModel,
        "activation_checkpointing_enable|gradient_checkpointing_enable",
    ),
    "optimizer.convert": (torch.optim.Adam([torch.zeros(1)]), "_optimizer_step_pre_hooks"),
    "optimizer.convert, too": (torch.optim.Adam([torch.zeros(1)]), "_optimizer_step_post_hooks"),
    "loss.probe": (Linear4bit(2, 2), "support_avx512bf16_for_cpu"),
    "optimizers.on_card": (bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer"),
    "optimizers.on_card, too": (bitsandbytes.optim.optimizer.Optimizer8bit, "fill_qmap"),
    "optimizers.on_card, once more": (bitsandbytes.optim.optimizer.GlobalOptimManager, "_instance"),
    "optimizers.on_card, its wait": (bitsandbytes.optim.optimizer, "sync_gpu"),
    "optimizers.on_card, 8 bits": (bitsandbytes.functional, "optimizer_update_8bit_blockwise"),
    "optimizers.on_card, 32 bits": (bitsandbytes.functional, "optimizer_update_32bit"),
    "world._quantized": (bitsandbytes, "matmul"),
    "world._quantized, DoRA": (peft.tuners.lora.dora, "dequantize_module_weight"),
    "world._quantized, LoRA": (peft.tuners.lora.layer, "dequantize_module_weight"),
    "world.world, states": (torch.utils.checkpoint, "get_device_states"),
    "world.world, states back": (torch.utils.checkpoint, "set_device_states"),
    "world.world, device": (torch.utils.checkpoint.DefaultDeviceType, "set_device_type"),
    "world.world, offload": (OFFLOADS, "save_on_cpu"),
    "world.world, apply": (nn.Module, "_apply"),
    "kernels.kernels": (torch.ops.bitsandbytes, "gemm_4bit"),
    "kernels.kernels, rows": (torch.ops.bitsandbytes, "int8_vectorwise_quant"),
    "kernels.kernels, product": (torch.ops.bitsandbytes, "int8_mixed_scaled_mm"),
    "int8.matmul": (bitsandbytes.autograd._functions, "MatMul8bitLt"),
    "trainer._input_grads": (PreTrainedModel, "enable_input_require_grads"),
    "paging.own": (bitsandbytes.functional.GlobalPageManager.get_instance(), "paged_tensors"),
}
if not OLDER_TRL:  # transformers 4 stands beside it
    UPSTREAM["world.world"] = (masking_utils, "is_tracing")
    UPSTREAM["world.world, too"] = (masking_utils, "fast_all")


@pytest.mark.parametrize("user", UPSTREAM)
def test_a_name_that_the_library_asks_for_softly_is_still_there(user: str) -> None:
    owner, names = UPSTREAM[user]
    found = [name for name in names.split("|") if hasattr(owner, name)]
    assert found, f"{names} is gone, and {user} would go on without a word"


def test_trl_averages_entropy_in_one_of_two_ways() -> None:
    told = inspect.getsource(SFTTrainer.compute_loss)
    over_targets = "entropy_sum / num_valid" in told or "entropy_sum / total_tokens" in told
    assert over_targets is not (_MASKED_ENTROPY in told), "see metrics.entropy_counts_prompts"


@pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharding_is_told_by_the_accelerators_plugin(name: str) -> None:
    told = ast.unparse(source(Trainer.create_accelerator_and_postprocess))
    kind = name.split("_")[1]
    assert f"self.{name} = getattr(self.accelerator.state, '{kind}_plugin', None)" in told, (
        f"Trainer.{name} is set elsewhere: see guard.check"
    )
