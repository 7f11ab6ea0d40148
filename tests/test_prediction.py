"""Estimates: against measured peaks, at further points, and what they leave behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ViTConfig,
)

from benchmarks.prediction import CARD, DATA, config_of, estimated, rows_of
from oomguard import ConfigurationError, Plan, estimate
from oomguard.memory.cards import Card
from oomguard.prediction import closed_form
from oomguard.prediction.chunks import lengthened
from oomguard.prediction.depth import CHUNK, Deep, NotAlikeError
from oomguard.prediction.kernels import fused_4bit
from oomguard.prediction.model import meta_model
from oomguard.prediction.predictor import Predictor
from oomguard.prediction.predictor import rows_of as rows_in
from oomguard.prediction.settings import Settings
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


def deep(**changes: Any) -> LlamaConfig:
    values = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 9}
    return tiny.config(**{**values, **changes})


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


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "rows_first"), [("none", 2), ("nf4", 1)])
def test_a_further_point_is_what_a_trace_of_its_own_gives(
    quantization: str, rows_first: int
) -> None:
    settings = Settings(quantization=quantization)
    predictor = Predictor(deep(), settings)
    predictor.at(lora(per_device_train_batch_size=rows_first))
    for rows, length in ((4, 48), (1, 201)):
        plan = lora(per_device_train_batch_size=rows, max_length=length)
        further, own = predictor.at(plan), Predictor(deep(), settings).at(plan)
        assert further.peak_allocated_bytes == own.peak_allocated_bytes
        assert further.peak_reserved_bytes == own.peak_reserved_bytes
        assert further.breakdown == own.breakdown
        assert further.seconds < 0.5 * own.seconds


@tiny.needs_fused_head
@pytest.mark.parametrize("shapes", [((1, 6000), (64, 125)), ((3, 4200), (40, 1001))])
def test_a_further_point_is_a_replay_whatever_the_chunks_of_the_head(
    shapes: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (lora(per_device_train_batch_size=b, max_length=n) for b, n in shapes)
    predictor = Predictor(deep())
    predictor.at(first)
    further = predictor.at(second)
    monkeypatch.setattr("oomguard.prediction.fit.TRACED", 99)  # every chunk
    own = Predictor(deep()).at(second, alone=True)
    assert further.peak_allocated_bytes == own.peak_allocated_bytes
    assert further.peak_reserved_bytes == own.peak_reserved_bytes
    assert further.breakdown == own.breakdown
    assert further.seconds < 0.3


@tiny.needs_fused_head
def test_rows_as_long_as_a_sliding_window_run_as_longer_ones() -> None:
    values = {**_MIXTRAL, "sliding_window": 64, "max_position_embeddings": 512}
    predictor = Predictor(MistralConfig(**values))
    predictor.at(lora(max_length=64))
    plan = lora(max_length=96)
    further = predictor.at(plan)
    own = Predictor(MistralConfig(**values)).at(plan, alone=True)
    assert further.peak_allocated_bytes == own.peak_allocated_bytes
    assert further.seconds < 0.5 * own.seconds


def test_chunks_that_do_not_behave_alike_are_not_repeated() -> None:
    made = [((0, n), n) for n in range(4)]
    alike: list[Any] = [CHUNK, made[1], ((0, 0), -1), CHUNK, made[2], ((0, 1), -1), CHUNK]
    ended = ["forward", made[0], *alike, ((0, 2), -1)]
    longer = lengthened(Deep(ended), 2).events
    frees = [key for key, source in (e for e in longer if isinstance(e, tuple)) if source < 0]
    allocations = [
        key for key, source in (e for e in longer if isinstance(e, tuple)) if source >= 0
    ]
    assert frees == allocations
    assert len(frees) == 5
    other = [made[3] if event == ((0, 1), -1) else event for event in ended]
    with pytest.raises(NotAlikeError):
        lengthened(Deep(other), 1)


@tiny.needs_fused_head
def test_repeated_layers_are_what_every_layer_traced_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = lora(gradient_checkpointing=False)
    few = Predictor(deep()).at(plan, alone=True)
    monkeypatch.setattr("oomguard.prediction.prepared.cut", lambda *_: None)
    every = Predictor(deep()).at(plan, alone=True)
    assert few.peak_allocated_bytes == every.peak_allocated_bytes
    assert few.peak_reserved_bytes == every.peak_reserved_bytes


@tiny.needs_fused_head
def test_the_breakdown_adds_up_to_the_reserved_bytes() -> None:
    found = estimate(deep(), lora())
    assert sum(found.breakdown.values()) == found.peak_reserved_bytes
    assert found.device_bytes == found.peak_reserved_bytes + 648_871_936 + 148 * 2**20
    assert json.loads(json.dumps(found.to_dict()))["breakdown"] == found.breakdown


@tiny.needs_fused_head
def test_a_tied_head_is_counted_once() -> None:
    words = 4096 * 128 * 2
    tied = estimate(deep(vocab_size=4096, tie_word_embeddings=True), lora())
    apart = estimate(deep(vocab_size=4096, tie_word_embeddings=False), lora())
    assert apart.breakdown["weights"] - tied.breakdown["weights"] == words


@tiny.needs_fused_head
@pytest.mark.parametrize("expandable", [False, True])
def test_what_fits_is_replayed_under_the_limit(expandable: bool) -> None:
    found = estimate(deep(), lora(), expandable_segments=expandable)
    outside_bytes = found.device_bytes - found.peak_reserved_bytes
    assert found.fits(found.device_bytes)
    assert not found.fits(found.peak_allocated_bytes + outside_bytes - 1)


@pytest.mark.slow
def test_what_is_asked_for_by_name_is_traced() -> None:
    more: tuple[tuple[Any, dict[str, Any]], ...] = (
        (deep(), {"use_dora": True, "gradient_checkpointing": False}),
        (deep(), {"quantization": "int8"}),
        (deep(), {"quantization": "fp4", "double_quant": False}),
        (deep(), {"attn_implementation": "eager", "padded": True}),
        (deep(), {"packing": True}),
        (deep(), {"trainer": "trainer", "gradient_accumulation_steps": 3}),
        (deep(), {**_FULL, "optim": "adafactor"}),
        (deep(), {**_FULL, "optim": "paged_adamw_32bit", "dtype": "float32"}),
        (GPT2Config(n_layer=6, n_embd=64, n_head=4), {"target_modules": ("c_attn",)}),
        (MixtralConfig(**_MIXTRAL), {}),
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


@tiny.needs_fused_head
def test_a_model_that_cannot_be_traced_gets_a_closed_form_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.functional, "silu", _broken)
    found = estimate(deep(), lora())
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
    estimate(deep(), lora(optim="adamw_8bit"), quantization="nf4")
    with pytest.raises(ConfigurationError):
        estimate(deep(), lora(target_modules=("nothing",)))
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
        (deep(), {"lora_r": None, "quantization": "nf4"}, "cannot be trained whole"),
        (deep(), {"lora_r": None, "use_dora": True}, "belong to LoRA"),
        (deep(), {"padded": True, "packing": True}, "exclude each other"),
        (deep(), {"optim": "nothing", "trainer": "trainer"}, "no optimizer of TrainingArguments"),
        (deep(), {"card": "nothing"}, "neither a size"),
        (deep(), {"nothing": 1}, "neither a field of Plan nor of Settings"),
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
    few, many = 4, 2048
    assert fused_4bit(card, torch.bfloat16, few, 4096, 4096)
    assert not fused_4bit(card, torch.bfloat16, many, 4096, 4096)
    assert not fused_4bit(Card.of("12GiB"), torch.bfloat16, few, 4096, 4096)


@pytest.mark.skipif(
    not tiny.needs_fused_head.args[0],
    reason="this TRL has a fused language-model head",
)
def test_a_trl_that_makes_all_logits_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="makes all logits at once, which estimates"):
        estimate(tiny.config(), trainer="sft")
    plain = estimate(tiny.config(), trainer="trainer", mixed_precision="no", card=CARD)
    assert (plain.method, plain.notes) == ("traced", ())
