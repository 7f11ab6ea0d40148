"""TRL's language-model head, whose kernels a trace replaces by name."""

from __future__ import annotations

import inspect

import pytest

from tests import tiny


@tiny.needs_fused_head
@pytest.mark.parametrize(
    "name", ["_forward_kernel", "_backward_kernel", "_use_triton", "_addmm_fp32"]
)
def test_the_kernels_of_trls_head_are_where_a_trace_replaces_them(name: str) -> None:
    from trl.kernels import chunked_logprob

    assert hasattr(chunked_logprob, name), f"{name} is gone: see world._triton"
    assert name in inspect.getsource(chunked_logprob.ChunkedLogProbFunction)


@tiny.needs_fused_head
def test_trl_asks_for_triton_in_its_second_module_too() -> None:
    from trl.trainer import utils

    assert hasattr(utils, "_use_triton"), "_use_triton is gone: see world._triton"
