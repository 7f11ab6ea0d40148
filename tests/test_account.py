from __future__ import annotations

from typing import Any

import torch
from torch import nn

from oomguard.watch.account import Account, account


def test_weights_gradients_and_state_are_added_up_and_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    assert account(model, None) == account(model, optimizer)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    parameters = 64 + 8 + 8 + 8  # the matrix, the norm's weight and bias, the last bias
    buffers = 4 * 8 + 4 * 8 + 8  # the running mean and variance, and an int64
    assert account(model, optimizer) == Account(
        weights_bytes=4 * parameters + buffers,
        gradients_bytes=4 * parameters,
        optimizer_bytes=2 * 4 * parameters + 4 * 4,  # a step counter for each of four tensors
    )
    assert account(model, optimizer).total_bytes == 4 * parameters * 4 + buffers + 16


def test_paged_state_is_not_the_allocators() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    (state,) = optimizer.state.values()
    assert account(model, optimizer).optimizer_bytes == 64
    state["momentum_buffer"].is_paged = True  # as bitsandbytes marks it
    assert account(model, optimizer).optimizer_bytes == 0


def test_state_in_lists_counts_too() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), history_size=3)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    (state,) = optimizer.state.values()
    kept = [value for value in state.values() if isinstance(value, torch.Tensor)]
    kept += [*state["old_dirs"], *state["old_stps"], *state["ro"]]
    assert state["old_dirs"]
    assert account(model, optimizer).optimizer_bytes >= sum(value.nbytes for value in kept)
