"""Models that cannot be traced get a closed form, soon, and it says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import MambaConfig

from oomguard import estimate
from oomguard.prediction import recorder
from tests import tiny

if TYPE_CHECKING:
    import pytest

pytestmark = tiny.needs_fused_head


def test_a_model_without_attention_gets_a_closed_form() -> None:
    config = MambaConfig(num_hidden_layers=8, hidden_size=64, vocab_size=512)
    found = estimate(config, target_modules=("in_proj",))
    assert found.method == "closed form"
    assert "MambaForCausalLM could not be traced" in found.notes[0]


def test_a_trace_ends_where_it_would_take_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_MOST_OPS", 500)
    found = estimate(tiny.deep_config(vocab_size=192))  # not traced before
    assert found.method == "closed form"
    assert "it runs more than 500 ops, as loops over tokens do" in found.notes[0]
