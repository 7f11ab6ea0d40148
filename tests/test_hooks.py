"""The points at which a Trainer is intercepted: what upstream must keep, and what is put back."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import peft
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
    TrainerCallback,
    masking_utils,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer

import oomguard
from oomguard.hooks import GuardedTrainer
from oomguard.ladder import Ladder
from oomguard.levers.merged_metrics import _MASKED_ENTROPY
from oomguard.levers.metrics import _LOOP_OWNS
from oomguard.levers.tokens import counted_in_the_loop
from oomguard.rungs import CheckpointActivations, SplitBatch
from oomguard.testing import VirtualCard
from tests.kinds import HALF, RECOMPUTED, Neighbour, fit, is_left_alone, make, sft
from tests.tiny import largest_difference, weights

if TYPE_CHECKING:
    from collections.abc import Callable


# Transformers 4 makes an epoch in the body of one method, and counts and clips there too.
LOOP = getattr(Trainer, "_run_epoch", None) or Trainer._inner_training_loop
CLIPPING = [
    getattr(Trainer, name)
    for name in ("_clip_grad_norm", "_get_grad_norm")
    if LOOP is not Trainer._inner_training_loop
]


def source(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def calls(function: Any) -> list[str]:
    """What a function calls, in the order of its source."""
    found = [node for node in ast.walk(source(function)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(node.func) for node in sorted(found, key=lambda n: (n.lineno, n.col_offset))
    ]


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


def test_the_loop_makes_a_step_in_the_order_the_guard_relies_on() -> None:
    loop = [name.removeprefix("self.") for name in calls(LOOP)]
    # Input tokens are counted after a batch, or before it: see levers.tokens.
    before = ["accelerator.gather"] if counted_in_the_loop() else []
    after = [] if counted_in_the_loop() else ["_track_num_input_tokens"]
    clipping = [inner.__name__ for inner in CLIPPING] or ["accelerator.clip_grad_norm_"]
    order = [
        *("get_batch_samples", *before, "training_step", "floating_point_ops", *after),
        *(*clipping, "optimizer.step", "lr_scheduler.step"),
    ]
    assert [name for name in loop if name in order] == order, (
        f"Trainer.{LOOP.__name__}: a step is made in another order, or a part of it twice; "
        "compare it with hooks.GuardedTrainer and step.StepTransaction"
    )
    for inner in CLIPPING:
        assert "self.accelerator.clip_grad_norm_" in calls(inner), (
            f"Trainer.{inner.__name__} clips by another name: see Hooks.batches"
        )
    assert "self.accelerator.backward" in calls(Trainer.training_step), (
        "Trainer.training_step runs no backward: see StepTransaction.run"
    )


def test_the_loop_adds_to_one_plain_number_between_two_batches() -> None:
    assert _LOOP_OWNS == "current_flos"
    (inner,) = [
        node
        for node in ast.walk(source(LOOP))
        if isinstance(node, ast.For) and "batch_samples" in ast.unparse(node.iter)
    ]
    assigned = {
        ast.unparse(target)
        for node in ast.walk(inner)
        if isinstance(node, (ast.Assign, ast.AugAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if ast.unparse(target).startswith("self.")
    }
    expected = {"self.current_flos", "self.control", "self.state.global_step", "self.state.epoch"}
    one_body = LOOP is Trainer._inner_training_loop
    expected |= {"self.state.num_input_tokens_seen"} if one_body else {"self._tr_loss"}
    assert assigned == expected, (
        f"Trainer.{LOOP.__name__} assigns other attributes inside a step: _LOOP_OWNS in "
        "levers/metrics.py must name every plain number among them, or a replay takes it back"
    )


class Watched(SFTTrainer):
    """Remembers its plain numbers around every batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("seen", []).append(self.numbers())
        loss = super().training_step(*args, **kwargs)
        self.__dict__["seen"].append(self.numbers())
        return loss

    def numbers(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if isinstance(v, (int, float))}
        return {**plain, "lists": str(self._metrics)}


def test_only_that_number_moves_between_two_batches_of_a_real_step(tmp_path: Path) -> None:
    trainer = sft(tmp_path, trainer_class=Watched, max_steps=1, include_num_input_tokens_seen="all")
    trainer.train()
    _, after_first, before_second, _ = trainer.seen
    moved = {name for name in after_first if after_first[name] != before_second[name]}
    assert moved == {_LOOP_OWNS}, "see _LOOP_OWNS in levers/metrics.py"


def test_accelerates_loader_moves_batches_by_its_device_alone() -> None:
    rows = [torch.tensor([index]) for index in range(4)]
    loader = DataLoaderShard(rows, device=torch.device("meta"), batch_size=2, _non_blocking=True)
    assert [batch.device.type for batch in loader] == ["meta"] * 2
    loader.device = None
    assert [batch.tolist() for batch in loader] == [[[0], [1]], [[2], [3]]], (
        "DataLoaderShard moves batches by something else than .device: see Feed.attach"
    )
    assert loader._non_blocking is True, "DataLoaderShard._non_blocking: see Feed.attach"
    inner = vars(loader.base_dataloader)
    inner["collate_fn"], inner["dataset"] = len, rows[:3] + rows
    assert list(loader) == [2, 2], (
        "DataLoaderShard does not iterate the base_dataloader whose collate_fn Feed replaces"
    )


# Private names of other packages that oomguard uses, each with a check that it still means the
# same there. `testing` is left out: its own tests run every one of them.
OLDER_TRL = not hasattr(DPOTrainer, "_compute_loss")  # whose other trainers are not split
ATEN = torch.ops.aten
MAKES_CONFIG: Any = LlamaConfig
ONE = torch.ones(1)
SDPA = ("query", "key", "value")


def begins_with(op: Any, *names: str) -> bool:
    """Whether these are the first arguments of an operator."""
    return [argument.name for argument in op.default._schema.arguments][: len(names)] == list(names)


PRIVATE: dict[str, Callable[[], Any]] = {
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
    "_get_output_dir": lambda: (
        list(inspect.signature(Trainer._get_output_dir).parameters) == ["self", "trial"]
    ),
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
    "_schema": lambda: (
        torch.ops.aten.add_.Tensor._schema.is_mutable
        and not torch.ops.aten.add.Tensor._schema.is_mutable
    ),
}


def parameters(method: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(method).parameters)[1:]


def dispatches_as_before() -> bool:
    found = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._AutoDispatchBelowAutograd(), torch._C._ForceDispatchKeyGuard(*found):
        return (torch.ones(1, requires_grad=True) * 2).requires_grad


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
    "world.world": (masking_utils, "is_tracing"),
    "world.world, too": (masking_utils, "fast_all"),
    "optimizers.on_card": (bitsandbytes.optim.optimizer.Optimizer8bit, "get_state_buffer"),
    "optimizers.on_card, too": (bitsandbytes.optim.optimizer.Optimizer8bit, "fill_qmap"),
    "paging.own": (bitsandbytes.functional.GlobalPageManager.get_instance(), "paged_tensors"),
}


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


def test_train_may_be_called_twice_in_one_guard_and_keeps_its_plan(tmp_path: Path) -> None:
    trainer, twin = make(tmp_path), make(tmp_path)
    with VirtualCard("1 GiB") as card:
        card.track(trainer.model)
        trainer.add_callback(Neighbour(card, 2, HALF, "on_step_begin"))
        with oomguard.Guard(trainer, ladder=Ladder(SplitBatch())) as guard:
            trainer.train()
            assert guard.report.status == "running"
            trainer.train()
    twin.train()
    twin.train()
    assert [recovery.rung for recovery in guard.report.recoveries] == ["SplitBatch"]
    assert largest_difference(weights(trainer), weights(twin)) < 1e-6
    assert is_left_alone(trainer)


def test_fit_twice_and_plain_training_after_it_are_three_plain_trainings(tmp_path: Path) -> None:
    trainer, twin = make(tmp_path), make(tmp_path)
    ladder = Ladder(CheckpointActivations())
    first, second = (fit(trainer, leave=RECOMPUTED, ladder=ladder) for _ in range(2))
    assert is_left_alone(trainer)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW), "see Hooks._step"
    trainer.train()
    for _ in range(3):
        twin.train()
    assert [recovery.rung for recovery in first.recoveries] == ["CheckpointActivations"]
    assert second.initial_plan.gradient_checkpointing  # it stays on, and is enough
    assert second.recoveries == []
    assert largest_difference(weights(trainer), weights(twin)) == 0.0


class Recorder(TrainerCallback):
    """Records every event and the step it came in."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, *_, **__: self.events.append((name, state.global_step))
        return super().__getattribute__(name)


def test_callbacks_see_a_recovered_run_as_they_see_a_plain_one(tmp_path: Path) -> None:
    trainer, twin = make(tmp_path, logging_steps=1), make(tmp_path, logging_steps=1)
    seen, expected = Recorder(), Recorder()
    trainer.add_callback(seen)
    twin.add_callback(expected)
    twin.train()
    before = list(trainer.callback_handler.callbacks)
    assert len(fit(trainer).recoveries) == 2
    assert seen.events == expected.events
    assert trainer.callback_handler.callbacks == before
