"""What no plan names of a live trainer: what is trained, by which optimizer, with which loss."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bitsandbytes.optim.adamw import AdamW, PagedAdamW8bit
from peft import IA3Config, LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM, Trainer
from trl import SFTTrainer

from oomguard import estimate
from oomguard.prediction.predictor import Predictor
from oomguard.prediction.trainer import plan_of
from oomguard.testing import VirtualCard
from tests import tiny
from tests.test_prediction_on_host import plain, sft

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_IA3: dict[str, Any] = {"target_modules": ["k_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def model() -> Any:
    return tiny.llama(num_hidden_layers=7, hidden_size=64, intermediate_size=256)


def lora(**changes: Any) -> Any:
    return get_peft_model(model(), LoraConfig(**{**_LORA, **changes}))


def with_head() -> Any:
    return lora(modules_to_save=["lm_head", "embed_tokens"])


def with_head_unfrozen() -> Any:
    made = lora()
    made.base_model.model.lm_head.weight.requires_grad_(True)
    return made


def ia3() -> Any:
    return get_peft_model(model(), IA3Config(**_IA3, feedforward_modules=["down_proj"]))


def experts() -> Any:
    values = tiny.config(num_hidden_layers=7, hidden_size=64, intermediate_size=128).to_dict()
    del values["model_type"]
    mixture = MixtralForCausalLM(MixtralConfig(**values, num_local_experts=4))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(mixture, LoraConfig(**_LORA, target_parameters=parameters))


def last_layer() -> Any:
    made = model()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("layers.6" in name)
    return made


TUNED: dict[str, Callable[[], Any]] = {
    "a head besides LoRA": with_head,
    "an unfrozen head": with_head_unfrozen,
    "two layers": lambda: lora(target_modules=["q_proj"], layers_to_transform=[2, 6]),
    "ranks": lambda: lora(rank_pattern={"q_proj": 32, "layers.3.mlp.up_proj": 16}),
    "IA3": ia3,
    "experts": experts,
    "the last layer": last_layer,
}


needs_grouped_experts = pytest.mark.skipif(
    find_spec("transformers.integrations.moe") is None,
    reason="which tokens an expert gets decides what transformers 4 runs",
)


MARKS: dict[str, Any] = {
    "an unfrozen head": pytest.mark.slow,
    "two layers": pytest.mark.slow,
    "ranks": pytest.mark.slow,
    "IA3": pytest.mark.slow,
    "experts": (pytest.mark.slow, needs_grouped_experts),
}


class Pops(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        labels = inputs.pop("labels")
        return self.entropy(model(**inputs).logits, labels)

    def entropy(self, logits: Any, labels: Any) -> Any:
        shifted = logits[:, :-1].contiguous().float()
        return cross_entropy(shifted.flatten(0, 1), labels[:, 1:].flatten())


class Keeps(Pops):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        outputs = model(**inputs)
        return self.entropy(outputs.logits, inputs["labels"])


class Asks(SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def predicted_and_measured(trainer: Any) -> tuple[Any, int]:
    found = estimate(trainer, card="host")
    with VirtualCard(capacity_bytes="1GiB") as card:
        card.track(trainer.model)
        trainer.train()
    return found, card.peak_bytes


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in TUNED])
def test_what_is_trained_is_what_is_predicted(kind: str, tmp_path: Path) -> None:
    found, measured = predicted_and_measured(plain(TUNED[kind](), 12, output_dir=str(tmp_path)))
    assert (found.method, found.notes) == ("traced", ())
    assert found.peak_allocated_bytes == measured


@pytest.mark.parametrize("kind", [Pops, pytest.param(Keeps, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_known_is_counted_and_named(kind: type, tmp_path: Path) -> None:
    trainer: Any = plain(model(), 12, output_dir=str(tmp_path))
    trainer.__class__ = kind
    found, measured = predicted_and_measured(trainer)
    assert found.notes[0].startswith(f"compute_loss of {kind.__name__} is not traced")
    assert found.peak_allocated_bytes == measured


@tiny.needs_fused_head
def test_a_loss_that_asks_trls_is_trls(tmp_path: Path) -> None:
    trainer: Any = sft(model(), 12, output_dir=str(tmp_path))
    plain_loss = estimate(trainer, card="host")
    trainer.__class__ = Asks
    found = estimate(trainer, card="host")
    assert found.notes == ()
    assert found.peak_allocated_bytes == plain_loss.peak_allocated_bytes


@pytest.mark.slow
@tiny.needs_fused_head
def test_a_smoothed_loss_takes_the_whole_logits(tmp_path: Path) -> None:
    given = {"output_dir": str(tmp_path), "label_smoothing_factor": 0.1}
    found, measured = predicted_and_measured(sft(model(), 12, **given))
    assert found.peak_allocated_bytes == measured


def test_a_plan_of_fewer_targets_and_a_lower_rank_takes_less(tmp_path: Path) -> None:
    trainer = plain(lora(rank_pattern={"q_proj": 32}), 12, output_dir=str(tmp_path))
    predictor, plan = Predictor.of(trainer), plan_of(trainer)
    peaks = [
        predictor.at(other, "host").peak_allocated_bytes
        for other in (
            plan,
            replace(plan, lora_r=4),
            replace(plan, lora_r=4, target_modules=("q_proj",)),
        )
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    uniform = plain(lora(r=4), 12, output_dir=str(tmp_path))
    assert peaks[1] == estimate(uniform, card="host").peak_allocated_bytes


def test_what_is_compiled_is_named(tmp_path: Path) -> None:
    trainer = plain(model(), 12, output_dir=str(tmp_path))
    trainer.args.torch_compile = True
    notes = estimate(trainer, card="host").notes
    assert notes == ("torch_compile is not traced: the same training without it is counted",)


def test_a_base_that_another_library_quantized_is_named(tmp_path: Path) -> None:
    from transformers import FbgemmFp8Config

    trainer: Any = plain(model(), 12, output_dir=str(tmp_path))
    trainer.model.config.quantization_config = FbgemmFp8Config()
    found = estimate(trainer, card="host")
    assert found.method == "closed form"
    assert "quantized by fbgemm_fp8" in found.notes[0]


@pytest.mark.parametrize("given", ["optimizer", "class"])
def test_the_optimizer_that_was_given_is_the_one_that_is_predicted(
    given: str, tmp_path: Path
) -> None:
    trainer: Any = plain(model(), 12, output_dir=str(tmp_path))
    if given == "optimizer":
        groups = [{"params": [p]} for p in trainer.model.parameters()]
        trainer.optimizer = torch.optim.AdamW(groups, lr=1e-3, amsgrad=True, fused=True)
    else:
        trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    found, measured = predicted_and_measured(trainer)
    assert found.peak_allocated_bytes == measured


@pytest.mark.parametrize(
    ("cls", "options", "optim"),
    [
        pytest.param(
            torch.optim.AdamW, {"fused": True}, "adamw_torch_fused", marks=pytest.mark.slow
        ),
        (PagedAdamW8bit, {}, "paged_adamw_8bit"),
        pytest.param(AdamW, {"optim_bits": 8}, "adamw_8bit", marks=pytest.mark.slow),
    ],
)
def test_an_optimizer_that_was_made_is_known_by_what_it_was_made_with(
    cls: Any, options: dict[str, Any], optim: str, tmp_path: Path
) -> None:
    model: Any = get_peft_model(tiny.llama(), tiny.LORA)  # no embeddings, no norms
    trainer: Any = plain(model, 12, output_dir=str(tmp_path))
    named = estimate(trainer, card="H100", optim=optim)
    trainer.optimizer = cls(trainer.model.parameters(), lr=1e-3, **options)
    found = estimate(trainer, card="H100")
    assert (found.method, found.breakdown) == ("traced", named.breakdown)
