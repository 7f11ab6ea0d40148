from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from oomguard.watch.batch import TokenCount
from tests import tiny


def test_passes_that_are_trained_on_count_with_their_padding() -> None:
    model, count, ids = tiny.llama().train(), TokenCount(), torch.ones(3, 5, dtype=torch.long)
    handle = count.attach(model)
    model(input_ids=ids)
    model(ids[:1])
    model(inputs_embeds=torch.randn(2, 4, 32))
    assert count.take() == 15 + 5 + 8
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()(input_ids=ids)
    assert count.take() is None
    handle.remove()
    model.train()(input_ids=ids)
    assert count.take() is None


def test_what_is_no_text_has_no_tokens() -> None:
    model, count = nn.Linear(4, 4), TokenCount()
    count.attach(model)
    model(torch.randn(2, 4))
    assert count.take() is None


def test_a_tensor_that_tells_no_shape_does_not_reach_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Takes(nn.Module):
        def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
            return inputs_embeds

    model, count = Takes(), TokenCount()
    count.attach(model)
    rows = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)])
    for _ in range(2):
        assert model(inputs_embeds=rows) is rows
    assert count.take() is None
    (record,) = caplog.records
    assert record.getMessage().startswith("Not all tokens are counted: RuntimeError: ")


def test_a_counted_model_can_be_copied_and_pickled() -> None:
    model, count = nn.Embedding(8, 4), TokenCount()
    count.attach(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        other(torch.ones(2, 3, dtype=torch.long))
    assert count.take() is None
    model(torch.ones(2, 3, dtype=torch.long))
    assert count.take() == 6


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_code_has_no_trace_of_the_count(in_place: bool) -> None:
    count, graphs = TokenCount(), []
    plain = nn.Embedding(8, 4)
    count.attach(plain)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.name for node in graph.graph.nodes])
        return graph.forward

    model: Any = plain
    if in_place:
        plain.compile(fullgraph=True, backend=backend)
    else:
        model = torch.compile(plain, fullgraph=True, backend=backend)
    for _ in range(4):
        model(torch.ones(2, 3, dtype=torch.long))
    assert count.take() is None
    assert len(graphs) == 1, "the count made a graph break or compiled anew"
