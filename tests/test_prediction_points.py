"""Further points of a model: what one trace says of other shapes is what each would say itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from transformers import GPT2Config, MistralConfig, MixtralConfig

from oomguard import Plan, estimate
from oomguard.prediction import fit, predictor
from oomguard.prediction.chunks import with_chunks
from oomguard.prediction.depth import CHUNK, Deep, NotAlikeError
from oomguard.prediction.predictor import Predictor
from oomguard.prediction.settings import Settings
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from oomguard.prediction.result import Estimate

pytestmark = tiny.needs_fused_head

H100 = "H100 80GB HBM3"
_LORA = {"lora_r": 8, "target_modules": ("q_proj", "v_proj"), "gradient_checkpointing": True}


def windowed() -> MistralConfig:
    values = tiny.deep_config().to_dict()
    del values["model_type"]
    return MistralConfig(**{**values, "sliding_window": 64, "max_position_embeddings": 512})


def mixture() -> MixtralConfig:
    values = tiny.deep_config().to_dict()
    del values["model_type"]
    return MixtralConfig(**{**values, "num_local_experts": 4, "sliding_window": None})


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=128, n_embd=128, n_layer=9, n_head=4, n_positions=8192)


def of(rows: int, length: int, **changes: Any) -> Plan:
    return Plan(**{**_LORA, "per_device_train_batch_size": rows, "max_length": length, **changes})


def own(config: PretrainedConfig, settings: Settings, plan: Plan) -> Estimate:
    """From passes of this very shape, in which nothing is repeated or scaled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "_traces", lambda *_: {})
        patch.setattr(fit.Fitted, "_any", lambda self, own, rank: self._trace((own,), rank))
        found = Predictor(config, settings).at(plan, H100)
    assert found.method == "traced", found.notes
    return found


def events(found: Estimate) -> list[Any]:
    """Events in order; autocast's cache lets go of its tensors in an order that is not fixed."""
    assert found.timeline is not None
    ordered: list[Any] = []
    frees: list[Any] = []
    for event in found.timeline.events:
        if isinstance(event, tuple) and event[1] < 0:
            frees.append(event)
        else:
            ordered += [*sorted(frees), event]
            frees = []
    return ordered + frees


CASES: dict[str, tuple[Callable[[], PretrainedConfig], Settings, dict[str, Any]]] = {
    "bf16": (tiny.deep_config, Settings(), {}),
    "nf4": (tiny.deep_config, Settings(quantization="nf4"), {}),
    "int8": (tiny.deep_config, Settings(quantization="int8"), {}),
    "float32 full": (
        tiny.deep_config,
        Settings(dtype="float32"),
        {"lora_r": None, "target_modules": None, "gradient_checkpointing": False},
    ),
    "window, padded": (windowed, Settings(padded=True), {}),
    "half padding": (tiny.deep_config, Settings(padded=True, target_share=0.53), {}),
    "plain trainer": (tiny.deep_config, Settings(trainer="trainer", mixed_precision="bf16"), {}),
    "plain trainer, padded": (tiny.deep_config, Settings(trainer="trainer", padded=True), {}),
    "packed": (tiny.deep_config, Settings(packing=True), {}),
    "eager, DoRA": (tiny.deep_config, Settings(attn_implementation="eager", use_dora=True), {}),
    "mixture of experts": (mixture, Settings(), {}),
    "GPT-2": (gpt2, Settings(), {"target_modules": ("c_attn",)}),
}
# One chunk of the head, two, three, many, and the edges between them; few tokens and many.
SHAPES = ((1, 2), (1, 9), (4, 48), (1, 201), (2, 1536), (1, 4097), (1, 4098), (3, 4200), (40, 1001))


@pytest.mark.parametrize(
    ("case", "shapes"),
    [
        *((case, SHAPES[1::6]) for case in ("bf16", "nf4")),
        *((case, SHAPES[7:8]) for case in ("float32 full", "window, padded", "packed")),
        *(pytest.param(case, SHAPES, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_a_further_point_is_what_a_trace_of_its_own_gives(
    case: str, shapes: tuple[tuple[int, int], ...]
) -> None:
    make, settings, changes = CASES[case]
    first = Predictor(make(), settings)
    first.at(of(2, 64, **changes), H100)
    for rows, length in shapes:
        plan = of(rows, length, **changes)
        further, alone = first.at(plan, H100), own(make(), settings, plan)
        assert further.breakdown == alone.breakdown, (rows, length)
        # A plain Trainer copies the labels of two rows, not those of one.
        if rows > 1 or "plain" not in case:
            assert events(further) == events(alone), (rows, length)


@pytest.mark.parametrize(
    ("optim", "settings", "ranks"),
    [
        ("adamw_torch_fused", Settings(), (16, 4, 40)),
        *(
            pytest.param(optim, settings, (16, 4, 40, 1, 500, 2000), marks=pytest.mark.slow)
            for optim in ("adamw_torch_fused", "adamw_8bit")
            for settings in (Settings(), Settings(quantization="nf4", use_dora=True))
        ),
    ],
)
def test_a_rank_between_two_is_what_a_trace_of_its_own_gives(
    optim: str, settings: Settings, ranks: tuple[int, ...]
) -> None:
    first = Predictor(tiny.deep_config(), settings)
    for rank in ranks:
        plan = of(2, 64, optim=optim, lora_r=rank)
        further, alone = first.at(plan, H100), own(tiny.deep_config(), settings, plan)
        wanted = events(alone)
        assert len(events(further)) == len(wanted)
        for event, want in zip(events(further), wanted, strict=True):
            # Partial norms and scales are for so many numbers each.
            near = isinstance(event, tuple) and 0 < event[1] - want[1] < 4096
            assert event == want or (near and event[0] == want[0]), (rank, event, want)
        assert further.peak_reserved_bytes == alone.peak_reserved_bytes


def test_a_fused_kernel_takes_no_dequantized_weight() -> None:
    settings = Settings(quantization="nf4")
    config = tiny.deep_config(hidden_size=1024, intermediate_size=1024)
    found = [Predictor(config, settings).at(of(1, n), H100) for n in (16, 2048)]
    weight = 1024 * 1024 * 2
    few, many = (
        sum(isinstance(event, tuple) and event[1] == weight for event in events(one))
        for one in found
    )
    # Both dequantize in backward, and once more in forward only where rows are many.
    assert 0 < few < many


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_further_point_takes_no_trace(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.deep_config(vocab_size=160)  # of no other test
    estimate(config, of(1, 64), quantization=quantization, card=H100)
    monkeypatch.setattr(fit, "trace", None)
    for rows, length in ((4, 48), (1, 6000), (64, 1001)):
        found = estimate(config, of(rows, length), quantization=quantization, card=H100)
        assert (found.method, found.seconds < 0.3) == ("traced", True)


def test_rows_as_long_as_a_sliding_window_run_as_longer_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Predictor(windowed())
    first.at(of(2, 64), H100)
    monkeypatch.setattr(fit, "trace", None)
    assert first.at(of(2, 96), H100).method == "traced"


def test_chunks_that_do_not_behave_alike_are_not_repeated() -> None:
    made = [((0, n), n) for n in range(4)]
    alike: list[Any] = [CHUNK, made[1], ((0, 0), -1), CHUNK, made[2], ((0, 1), -1), CHUNK]
    ended = ["forward", made[0], *alike, ((0, 2), -1)]
    for chunks in (1, 2, 3, 5):
        events = with_chunks(Deep(ended), chunks).events
        pairs = [event for event in events if isinstance(event, tuple)]
        frees = [key for key, source in pairs if source < 0]
        assert frees == [key for key, source in pairs if source >= 0]
        assert (len(frees), events.count(CHUNK)) == (chunks, min(chunks, 3))
    other = [made[3] if event == ((0, 1), -1) else event for event in ended]
    for chunks in (1, 5):
        with pytest.raises(NotAlikeError):
            with_chunks(Deep(other), chunks)


def test_repeated_layers_are_what_every_layer_traced_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = of(2, 64, gradient_checkpointing=False)
    few = own(tiny.deep_config(), Settings(), plan)
    monkeypatch.setattr("oomguard.prediction.prepared.cut", lambda *_: None)
    every = own(tiny.deep_config(), Settings(), plan)
    assert few.peak_allocated_bytes == every.peak_allocated_bytes
    assert few.peak_reserved_bytes == every.peak_reserved_bytes
