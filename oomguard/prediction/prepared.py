"""The model of a training on fake tensors, made ready as its trainer makes it ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32

from oomguard.errors import ConfigurationError
from oomguard.prediction import load
from oomguard.prediction.follow import Enter, Head, Leave, inherit, quantization_tensors
from oomguard.prediction.layers import cut, shorten
from oomguard.prediction.model import meta_model
from oomguard.prediction.subject import text_config
from oomguard.prediction.world import Autocast

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from oomguard.memory.cards import Card
    from oomguard.plan import Plan
    from oomguard.prediction.recorder import Recorder
    from oomguard.prediction.settings import Settings
    from oomguard.prediction.tuning import Tuning

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Prepared:
    """A shortened model with its adapters, checkpoints and autocast.

    Args:
        config: Of the model.
        plan: What is trained.
        settings: What is trained, besides the plan.
        card: On which.
        recorder: Told which layer runs.
        tuning: What is trained, where `plan` does not say it.
        whole: Whether every layer is kept, not the few that stand for all.

    Attributes:
        model: On the meta device until `load`.
        config: Its own configuration.
        cut: How it was shortened; `None` if it was not.
        kind: `"weights"` or `"adapters"` of the ids that are that.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        plan: Plan,
        settings: Settings,
        card: Card,
        recorder: Recorder,
        *,
        tuning: Tuning | None,
        whole: bool,
    ) -> None:
        self._plan, self._settings, self._recorder = plan, settings, recorder
        self._tuning = tuning
        self.kind: dict[int, str] = {}
        self.model: Any = meta_model(config, settings)
        self.config: Any = self.model.config
        self._warm_bytes = 0 if card.is_host else load.loaded_bytes(self.model, settings)
        every = settings.checkpoint_every_n_layers if plan.gradient_checkpointing else 1
        trained = None if tuning is None else tuning.layers
        self.cut = None if whole else cut(self.model, text_config(self.config), every, trained)
        if self.cut is not None and self.cut.times > 1:
            shorten(self.model, self.config, self.cut)

    def load(self) -> None:
        """Give it memory as `from_pretrained` would, then what the trainer adds."""
        settings, recorder = self._settings, self._recorder
        load.load(self.model, settings, recorder, self._layer_of, self._warm_bytes)
        self._name("weights")
        if settings.prepare_for_kbit:
            import peft

            self.model = peft.prepare_model_for_kbit_training(
                self.model, use_gradient_checkpointing=self._plan.gradient_checkpointing
            )
            recorder.mark(None)
            self._name("weights")
        base = self.model
        if self._tuning is None and self._plan.lora_r is None:
            for parameter in base.parameters():
                parameter.requires_grad_(True)
        else:
            self._tune()
        if self._plan.gradient_checkpointing:
            self._checkpoint(base)
        if settings.trainer == "sft":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        self._watch(base)

    def autocast(self) -> None:
        """As `Accelerator.prepare_model` does."""
        dtype = _DTYPES.get(self._settings.autocast)
        if dtype is None:
            return
        forward = self.model.forward

        def autocast(*args: Any, **kwargs: Any) -> Any:
            # PEFT and bitsandbytes ask for CUDA's state, autograd of fake tensors for the host's.
            with Autocast("cuda", dtype), Autocast("cpu", dtype):
                return forward(*args, **kwargs)

        self.model.forward = convert_outputs_to_fp32(autocast)

    def _layer_of(self, name: str) -> int | None:
        return None if self.cut is None else self.cut.unit_of(name)

    def _deep_name(self, name: str) -> str:
        return name if self.cut is None else self.cut.deep_name(name)

    def _name(self, kind: str) -> None:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for module in self.model.modules():
            tensors += quantization_tensors(module)
        for tensor in tensors:
            number = self._recorder.id_of(tensor)
            if number is not None:
                self.kind.setdefault(number, kind)

    def _tune(self) -> None:
        plan, settings, recorder = self._plan, self._settings, self._recorder
        first = len(recorder.nbytes)
        if self._tuning is None:
            self.model = self._with_lora(self.model)
        else:
            self.model = self._tuning.wrapped(self.model, plan, self._deep_name)
        wanted = settings.input_require_grads
        adapted = self._tuning is None or self._tuning.config is not None
        if adapted and plan.gradient_checkpointing if wanted is None else wanted:
            self.model.enable_input_require_grads()
        for name, parameter in self.model.named_parameters():
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

    def _with_lora(self, model: Any) -> Any:
        import peft

        plan, settings = self._plan, self._settings
        names: Any = list(plan.target_modules or ())
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
            return peft.get_peft_model(model, config)
        except ValueError as error:
            msg = f"LoRA on {', '.join(plan.target_modules or ())}: {error}"
            raise ConfigurationError(" ".join(msg.split())[:300]) from error

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
        if self.cut is not None:
            layers = base.get_submodule(self.cut.path)
            for unit, layer in zip(self.cut.unit, layers, strict=True):
                layer.register_forward_pre_hook(Enter(recorder, unit))
                layer.register_forward_hook(Leave(recorder, unit))
        head: Any = base.base_model
        head.register_forward_hook(Head(recorder))
