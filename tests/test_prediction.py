"""Estimates: against measured peaks, at further points, and what they leave behind."""

from __future__ import annotations

import json
from io import StringIO
from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import (
    BertConfig,
    DeepseekV3Config,
    GPT2Config,
    MixtralConfig,
    ViTConfig,
)

from benchmarks.prediction import CARD, DATA, config_of, estimated, rows_of
from gpu_checks.workload import LLAMA_1B
from oomguard import ConfigurationError, Plan, estimate
from oomguard.memory.cards import Card
from oomguard.prediction import closed_form
from oomguard.prediction.kernels import Matmul, fused_4bit
from oomguard.prediction.model import meta_model
from oomguard.prediction.optimizers import Own
from oomguard.prediction.predictor import Predictor
from oomguard.prediction.predictor import rows_of as rows_in
from oomguard.prediction.settings import Settings
from oomguard.prediction.trace import Given
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GIB = 2**30
LORA = {"lora_r": 8, "target_modules": ("q_proj", "v_proj")}
# One of each: 4-bit, unquantized, tied full fine-tune, padded without GQA, the math attention.
MEASURED: dict[str, dict[str, Any]] = {
    "mistral-7b": {"settings": {"quantization": "nf4"}, "checkpointing": True},
    "llama32-1b": {"settings": {"mixed_precision": "no"}, "checkpointing": True},
    "smollm2-135m": {"settings": {"dtype": "float32", "mixed_precision": "no"}},
    "qwen25-1.5b": {"settings": {"input_require_grads": True}, "checkpointing": False},
}


def lora(**changes: Any) -> Plan:
    values: dict[str, Any] = {"per_device_train_batch_size": 2, "max_length": 64, **LORA}
    return Plan(**{**values, "gradient_checkpointing": True, **changes})


@tiny.needs_fused_head
@pytest.mark.parametrize("model", MEASURED)
def test_a_measured_peak_is_met(model: str) -> None:
    want = MEASURED[model]
    row = next(
        row
        for row in rows_of(DATA / "h100-sft.json")
        if row["model"] == model
        and row["settings"] == want["settings"]
        and row["plan"]["gradient_checkpointing"] == want.get("checkpointing", True)
        and "peak_allocated_bytes" in row
    )
    found = estimated(row)
    assert found.method == "traced"
    assert found.peak_allocated_bytes == pytest.approx(row["peak_allocated_bytes"], rel=0.005)
    assert found.peak_reserved_bytes == pytest.approx(row["peak_reserved_bytes"], rel=0.06)


@tiny.needs_fused_head
def test_the_breakdown_adds_up_to_the_reserved_bytes() -> None:
    found = estimate(tiny.deep_config(), lora())
    assert sum(found.breakdown.values()) == found.peak_reserved_bytes
    assert found.device_bytes == found.peak_reserved_bytes + 648_871_936 + 148 * 2**20
    assert json.loads(json.dumps(found.to_dict()))["breakdown"] == found.breakdown


@tiny.needs_fused_head
def test_what_ran_out_of_memory_on_a_smaller_card_in_one_process_of_two_may_not_fit() -> None:
    """Llama-3.2-1B under 16 GiB: gpu_checks.find, docs/finding.md."""
    config = config_of({"model_type": "llama", **LLAMA_1B})
    plan = Plan(
        per_device_train_batch_size=47,
        max_length=1032,
        lora_r=16,
        target_modules=("all-linear",),
        optim="adamw_torch_fused",
        gradient_checkpointing=True,
    )
    found = estimate(config, plan, card="16GiB")
    usable_bytes = Card.of("16GiB").usable_bytes or 0
    assert found.peak_reserved_bytes < usable_bytes < found.most_reserved_bytes
    assert not found.fits("16GiB")
    assert found.fits("24GiB")
    console = Console(file=StringIO(), width=100)
    console.print(found)
    assert "16.00 GiB card: may not fit" in console.file.getvalue()  # type: ignore[attr-defined]


@tiny.needs_fused_head
def test_a_tied_head_is_counted_once() -> None:
    words = 4096 * 128 * 2
    tied = estimate(tiny.deep_config(vocab_size=4096, tie_word_embeddings=True), lora())
    apart = estimate(tiny.deep_config(vocab_size=4096, tie_word_embeddings=False), lora())
    assert apart.breakdown["weights"] - tied.breakdown["weights"] == words


@tiny.needs_fused_head
@pytest.mark.parametrize("expandable", [False, True])
def test_what_fits_is_replayed_under_the_limit(expandable: bool) -> None:
    found = estimate(tiny.deep_config(), lora(), expandable_segments=expandable)
    outside_bytes = found.device_bytes - found.peak_reserved_bytes
    assert found.fits(found.device_bytes)
    assert not found.fits(found.peak_allocated_bytes + outside_bytes - 1)


@pytest.mark.slow
def test_what_is_asked_for_by_name_is_traced() -> None:
    more: tuple[tuple[Any, dict[str, Any]], ...] = (
        (tiny.deep_config(), {"use_dora": True, "gradient_checkpointing": False}),
        (tiny.deep_config(), {"quantization": "int8"}),
        (tiny.deep_config(), {"quantization": "fp4", "double_quant": False}),
        (tiny.deep_config(), {"attn_implementation": "eager", "padded": True}),
        (tiny.deep_config(), {"packing": True}),
        (tiny.deep_config(), {"trainer": "trainer", "gradient_accumulation_steps": 3}),
        (tiny.deep_config(), {**_FULL, "optim": "adafactor"}),
        (tiny.deep_config(), {**_FULL, "optim": "paged_adamw_32bit", "dtype": "float32"}),
        (GPT2Config(n_layer=6, n_embd=64, n_head=4), {"target_modules": ("c_attn",)}),
        (MixtralConfig(**_MIXTRAL), {}),
        (DeepseekV3Config(**_DEEPSEEK), {"target_modules": ("o_proj",)}),
    )
    for config, settings in more:
        found = estimate(config, **{**LORA, "max_length": 64, **settings})
        assert (found.method, found.notes[:-1]) == ("traced", ()), settings


_FULL: dict[str, Any] = {"lora_r": None, "target_modules": None}
_MIXTRAL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


_DEEPSEEK: dict[str, Any] = {  # whose values are narrower than its keys
    **_MIXTRAL,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


@tiny.needs_fused_head
def test_a_model_that_cannot_be_traced_gets_a_closed_form_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.functional, "silu", _broken)
    found = estimate(tiny.deep_config(vocab_size=176), lora())  # not traced before
    assert found.method == "closed form"
    assert "LlamaForCausalLM could not be traced (RuntimeError: no such kernel)" in found.notes[0]
    assert found.peak_reserved_bytes > found.breakdown["weights"] * closed_form.RESERVED


@tiny.needs_fused_head
def test_the_closed_form_underestimates_no_measured_peak() -> None:
    rows = [row for path in DATA.glob("*.json") for row in rows_of(path)]
    for row in (row for row in rows if "peak_allocated_bytes" in row):
        plan, settings = Plan.from_dict(row["plan"]), Settings(**row["settings"])
        config = config_of(row["config"])
        found = closed_form.peak(
            config, meta_model(config, settings), plan, settings, rows_in(plan)
        )
        assert sum(found.values()) > row["peak_allocated_bytes"], row
        assert sum(found.values()) * closed_form.RESERVED > row["peak_reserved_bytes"], row


def _broken(*_: Any, **__: Any) -> None:
    msg = "no such kernel"
    raise RuntimeError(msg)


@tiny.needs_fused_head
def test_an_estimate_leaves_the_process_as_it_was() -> None:
    watched: tuple[Callable[[], Any], ...] = (
        lambda: torch.autocast,
        lambda: nn.functional.scaled_dot_product_attention,
        lambda: nn.functional.dropout,
        lambda: nn.Module._apply,
        lambda: vars(bitsandbytes)["matmul"],
        lambda: bitsandbytes.optim.optimizer.GlobalOptimManager._instance,
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.utils.checkpoint.DefaultDeviceType.get_device_type(),
        lambda: torch.get_rng_state().tolist(),
    )
    before = [read() for read in watched]
    estimate(tiny.deep_config(), lora(optim="adamw_8bit"), quantization="nf4")
    with pytest.raises(ConfigurationError):
        estimate(tiny.deep_config(), lora(target_modules=("nothing",)))
    assert [read() for read in watched] == before


@tiny.needs_fused_head
def test_a_live_trainer_is_estimated_and_left_alone(tmp_path: Path) -> None:
    trainer, twin = (tiny.sft_trainer(tmp_path / name, max_steps=1) for name in ("a", "b"))
    found = estimate(trainer)
    assert (found.plan.lora_r, found.settings.trainer, found.settings.padded) == (4, "sft", True)
    assert found.plan.max_length == 96
    assert (found.settings.dtype, found.settings.autocast) == ("float32", "no")
    trainer.train()
    twin.train()
    assert tiny.largest_difference(tiny.weights(trainer), tiny.weights(twin)) == 0.0


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (BertConfig(architectures=["BertModel"]), {}, "no language-model head"),
        (ViTConfig(), {}, "no language-model head"),
        ("there/is/no/such", {}, "no configuration of a model can be read"),
        ("./no-such.json", {}, "there is no ./no-such.json: give a folder"),
        (tiny.deep_config(), {"lora_r": None, "quantization": "nf4"}, "cannot be trained whole"),
        (tiny.deep_config(), {"lora_r": None, "use_dora": True}, "belong to LoRA"),
        (tiny.deep_config(), {"padded": True, "packing": True}, "exclude each other"),
        (tiny.deep_config(), {"target_share": 0.0}, "above 0 and at most 1"),
        (
            tiny.deep_config(),
            {"optim": "nothing", "trainer": "trainer"},
            "no optimizer of TrainingArguments",
        ),
        (tiny.deep_config(), {"card": "nothing"}, "neither a size"),
        (tiny.deep_config(), {"nothing": 1}, "neither a field of Plan nor of Settings"),
    ],
)
def test_what_cannot_work_is_refused(model: Any, settings: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        estimate(model, **settings)


def test_cards_are_known_by_name_and_by_size() -> None:
    assert Card.of("NVIDIA H100 80GB HBM3") is Card.of("h100")
    assert Card.of("RTX 4090").capability == (8, 9)
    assert Card.of("12GiB").total_bytes == 12 * GIB
    assert not Card.of("12GiB").known


def test_bitsandbytes_own_rule_chooses_its_kernel() -> None:
    card = Card.of(CARD)
    few = Matmul(torch.bfloat16, rows=4, outputs=4096, width=4096, blocksize=64)
    assert fused_4bit(card, few)
    assert not fused_4bit(card, few._replace(rows=2048))
    assert not fused_4bit(Card.of("12GiB"), few)


@pytest.mark.skipif(
    not tiny.needs_fused_head.args[0],
    reason="this TRL has a fused language-model head",
)
def test_a_trl_that_makes_all_logits_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="makes all logits at once, which estimates"):
        estimate(tiny.config(), trainer="sft")
    plain = estimate(tiny.config(), trainer="trainer", mixed_precision="no", card=CARD)
    assert (plain.method, plain.notes) == ("traced", ())


@tiny.needs_fused_head
def test_an_adam_that_goes_through_the_weights_in_a_loop_takes_less_than_all_at_once() -> None:
    plan = lora(**_FULL, per_device_train_batch_size=1, max_length=16, optim="adamw_torch")

    def peak(**kwargs: Any) -> int:
        own = Own(torch.optim.AdamW, kwargs, grouped=True, optim="adamw_torch")
        return Predictor(tiny.deep_config(), given=Given(own)).at(plan, CARD).peak_allocated_bytes

    at_once = Predictor(tiny.deep_config()).at(plan, CARD)
    assert at_once.phase == "optimizer step"
    assert peak() == at_once.peak_allocated_bytes
    assert peak(foreach=False) < at_once.peak_allocated_bytes
