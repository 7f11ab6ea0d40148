"""Two optimizer steps of the real code on fake tensors."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from oomguard.errors import ConfigurationError
from oomguard.prediction import kernels, load, optimizers
from oomguard.prediction.follow import (
    Enter,
    Head,
    Leave,
    inherit,
    quantization_tensors,
    sft_stand_in,
)
from oomguard.prediction.layers import Cut, cut, shorten
from oomguard.prediction.model import meta_model
from oomguard.prediction.recorder import Entry, Recorder
from oomguard.prediction.subject import text_config
from oomguard.prediction.world import Autocast, world

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PretrainedConfig

    from oomguard.memory.cards import Card
    from oomguard.plan import Plan
    from oomguard.prediction.settings import Settings

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Shape = tuple[int, int]
"""Rows, and tokens of each."""
LOAD, FORWARD, BACKWARD, STEP = "load", "forward", "backward", "optimizer step"


@dataclass
class Trace:
    """The log of two optimizer steps of a shortened model.

    Attributes:
        log: See `recorder.Entry`; phases are `"load"`, `"forward"`, `"backward"` and
            `"optimizer step"`.
        nbytes: Bytes of each id.
        part: What made each id.
        home: The unit of layers that each id belongs to.
        kind: `"weights"`, `"adapters"` or `"gradients"` of the ids that are that.
        cut: How the model was shortened; `None` if it was not.
        paged_bytes: Optimizer state in managed memory, of the shortened model.
        sized: The ids of the first step's passes, in order.
        alike: Ids of the second step's passes, each with the one of the first step that it repeats.
        probes: Bytes of the ids of `sized` in passes of other shapes.
    """

    log: list[Entry]
    nbytes: list[int]
    part: list[str]
    home: list[int | None]
    kind: dict[int, str]
    cut: Cut | None
    paged_bytes: list[int]
    sized: list[int]
    alike: dict[int, int]
    probes: list[list[int]]


def trace(
    config: PretrainedConfig,
    plan: Plan,
    settings: Settings,
    card: Card,
    shapes: Sequence[Shape],
    *,
    whole: bool = False,
) -> Trace:
    """Trace two steps in passes of the first shape, and one more pass of each of the others.

    Args:
        config: Of the model.
        plan: What is trained.
        settings: What is trained, besides the plan.
        card: On which.
        shapes: Rows and tokens of each.
        whole: Whether every layer is traced, not the few that stand for all.

    Raises:
        Exception: Whatever the model's own code raises on fake tensors.
    """
    paged: list[int] = []
    with (
        _quiet(),
        world(card, padded=settings.padded, packed=settings.packing),
        optimizers.on_card(paged),
    ):
        return _Run(config, plan, settings, card, paged, whole=whole).trace(shapes)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of a run that is none."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Run:
    """One trace: the objects of a training run and the recorder that watches them."""

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        settings: Settings,
        card: Card,
        paged: list[int],
        *,
        whole: bool,
    ) -> None:
        self._plan, self._settings, self._card, self._paged = plan, settings, card, paged
        self._args = optimizers.arguments(plan.optim or "adamw_torch_fused")
        fused = "fused" in self._args.optim.value or card.is_host
        self._recorder = Recorder(kernels.kernels(card), kernels.workspaces(), count_scalars=fused)
        self._kind: dict[int, str] = {}
        self._model: Any = meta_model(config, settings)
        self._config: Any = self._model.config
        self._warm_bytes = 0 if card.is_host else load.loaded_bytes(self._model, settings)
        every = settings.checkpoint_every_n_layers if plan.gradient_checkpointing else 1
        self._cut = None if whole else cut(self._model, text_config(self._config), every)
        if self._cut is not None and self._cut.times > 1:
            shorten(self._model, self._config, self._cut)

    def trace(self, shapes: Sequence[Shape]) -> Trace:
        recorder, passes = self._recorder, min(2, self._plan.passes_per_step)
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            recorder.mark(LOAD)
            self._load()
            optimizer = optimizers.create(self._model, self._args)
            if not self._card.is_host:
                optimizers.use_foreach(optimizer)
            self._autocast()
            self._model.train()
            # Trainer.train begins with Accelerator.free_memory.
            recorder.mark(None)
            begun = len(recorder.log)
            first = self._passes(passes, shapes[0])
            log = recorder.log[begun:]
            gradients = self._step(optimizer)
            # The passes of the second step do what those of the first did.
            again = recorder.repeat(first, log)
            self._take_gradients({p: again[number] for p, number in gradients.items()})
            self._step(optimizer)
            recorder.mark("end")
            logged = len(recorder.log)
            probes = []
            for shape in shapes[1:]:
                probes.append(self._passes(passes, shape))
                self._model.zero_grad()
            recorder.stop()
        return Trace(
            recorder.log[:logged],
            recorder.nbytes,
            recorder.part,
            recorder.home,
            self._kind,
            self._cut,
            self._paged,
            sized=list(first),
            alike={new: old for old, new in again.items()},
            probes=[[recorder.nbytes[i] for i in probe] for probe in probes],
        )

    def _passes(self, passes: int, shape: Shape) -> range:
        """The ids of the passes of one step."""
        first = len(self._recorder.nbytes)
        for _ in range(passes):
            self._pass(*shape)
        return range(first, len(self._recorder.nbytes))

    def _take_gradients(self, numbers: dict[nn.Parameter, int]) -> None:
        recorder = self._recorder
        recorder.paused = True
        for parameter, number in numbers.items():
            parameter.grad = torch.empty_like(parameter)
            recorder.adopt(parameter.grad, number)
        recorder.paused = False

    def _layer_of(self, name: str) -> int | None:
        if self._cut is None:
            return None
        _, found, rest = f".{name}.".partition(f".{self._cut.path}.")
        return self._cut.unit[int(rest.partition(".")[0])] if found else None

    def _load(self) -> None:
        settings, recorder = self._settings, self._recorder
        load.load(self._model, settings, recorder, self._layer_of, self._warm_bytes)
        self._name("weights")
        if settings.prepare_for_kbit:
            import peft

            self._model = peft.prepare_model_for_kbit_training(
                self._model, use_gradient_checkpointing=self._plan.gradient_checkpointing
            )
            recorder.mark(None)
            self._name("weights")
        base = self._model
        if self._plan.lora_r is None:
            for parameter in base.parameters():
                parameter.requires_grad_(True)
        else:
            self._add_adapters()
        if self._plan.gradient_checkpointing:
            self._checkpoint(base)
        if settings.trainer == "sft":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        self._watch(base)

    def _name(self, kind: str) -> None:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        for module in self._model.modules():
            tensors += quantization_tensors(module)
        for tensor in tensors:
            number = self._recorder.id_of(tensor)
            if number is not None:
                self._kind.setdefault(number, kind)

    def _add_adapters(self) -> None:
        import peft

        plan, settings, recorder = self._plan, self._settings, self._recorder
        names: Any = list(plan.target_modules or ())
        first = len(recorder.nbytes)
        config = peft.LoraConfig(
            r=plan.lora_r or 1,
            lora_alpha=plan.lora_r or 1,
            lora_dropout=settings.lora_dropout,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            target_modules="all-linear" if names == ["all-linear"] else names,
            task_type="CAUSAL_LM",
            # Other values, the same memory: random numbers of fake tensors cost time.
            init_lora_weights=False,
        )
        try:
            self._model = peft.get_peft_model(self._model, config)
        except ValueError as error:
            msg = f"LoRA on {', '.join(plan.target_modules or ())}: {error}"
            raise ConfigurationError(" ".join(msg.split())[:300]) from error
        wanted = settings.input_require_grads
        if plan.gradient_checkpointing if wanted is None else wanted:
            self._model.enable_input_require_grads()
        for name, parameter in self._model.named_parameters():
            recorder.layer = self._layer_of(name)
            sft_casts = settings.is_quantized and settings.trainer == "sft"
            if parameter.requires_grad and sft_casts and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
            number = recorder.id_of(parameter)
            if number is not None:
                recorder.home[number] = recorder.layer
        recorder.layer = None
        self._name("adapters")
        inherit(recorder, first)

    def _checkpoint(self, base: Any) -> None:
        every = self._settings.checkpoint_every_n_layers
        values: dict[str, Any] = {"use_reentrant": self._settings.use_reentrant}
        if hasattr(base, "activation_checkpointing_enable"):
            more: dict[str, Any] = {"every_n_layers": every} if every > 1 else {}
            if self._plan.offload_activations:
                more["offload"] = True
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=values, **more)
        else:
            base.gradient_checkpointing_enable(values)

    def _watch(self, base: Any) -> None:
        """Say which layer runs: at its beginning and end, and when its gradient arrives."""
        recorder = self._recorder
        if self._cut is not None:
            layers = base.get_submodule(self._cut.path)
            for unit, layer in zip(self._cut.unit, layers, strict=True):
                layer.register_forward_pre_hook(Enter(recorder, unit))
                layer.register_forward_hook(Leave(recorder, unit))
        head: Any = base.base_model
        head.register_forward_hook(Head(recorder))

    def _autocast(self) -> None:
        """As `Accelerator.prepare_model` does."""
        dtype = _DTYPES.get(self._settings.autocast)
        if dtype is None:
            return
        forward = self._model.forward

        def autocast(*args: Any, **kwargs: Any) -> Any:
            # PEFT and bitsandbytes ask for CUDA's state, autograd of fake tensors for the host's.
            with Autocast("cuda", dtype), Autocast("cpu", dtype):
                return forward(*args, **kwargs)

        self._model.forward = convert_outputs_to_fp32(autocast)

    def _pass(self, rows: int, length: int) -> None:
        recorder = self._recorder
        recorder.mark(FORWARD)
        inputs = self._inputs(rows, length)
        loss = self._loss(inputs)
        del inputs
        recorder.mark(BACKWARD)
        recorder.in_head = recorder.in_backward = True
        loss.backward()
        recorder.in_head = recorder.in_backward = False
        # What nodes hold outside of saved tensors, as bitsandbytes' do, goes with the whole graph.
        recorder.layer = None
        del loss

    def _inputs(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """A batch as TRL's collators name it."""
        names = ["input_ids", "labels", "attention_mask"]
        if self._settings.packing:
            names[2] = "position_ids"
        return {name: torch.empty(rows, length, dtype=torch.int64) for name in names}

    def _loss(self, inputs: dict[str, torch.Tensor]) -> Any:
        items = torch.empty((), dtype=torch.int64)
        if self._settings.trainer == "sft":
            from trl import SFTTrainer

            return SFTTrainer.compute_loss(
                sft_stand_in(self._model, self._config),
                self._model,
                inputs,
                num_items_in_batch=items,
            )
        outputs = self._model(**inputs, num_items_in_batch=items)
        return outputs["loss"]

    def _copies(self, gradients: dict[nn.Parameter, int]) -> Iterator[torch.Tensor]:
        """Every gradient as often as the deep model has it."""
        for parameter, number in gradients.items():
            cut = self._cut
            cloned = cut is not None and self._recorder.home[number] == cut.cloned
            for _ in range(cut.times if cut is not None and cloned else 1):
                yield parameter

    def _step(self, optimizer: Any) -> dict[nn.Parameter, int]:
        """Clip, step, and drop the gradients; the id of each parameter's."""
        recorder, model = self._recorder, self._model
        recorder.mark(STEP)
        trained = [p for p in model.parameters() if p.requires_grad]
        numbers = {p: recorder.id_of(p.grad) for p in trained if p.grad is not None}
        gradients = {p: number for p, number in numbers.items() if number is not None}
        self._kind.update(dict.fromkeys(gradients.values(), "gradients"))
        recorder.stepping = True
        if self._settings.max_grad_norm:
            for nbytes in optimizers.norm_bytes(self._copies(gradients)):
                recorder.free(recorder.allocate(nbytes, "norms"))
            nn.utils.clip_grad_norm_(trained, self._settings.max_grad_norm)
        optimizer.step()
        recorder.stepping = False
        recorder.mark("end of step")
        model.zero_grad()
        return gradients
