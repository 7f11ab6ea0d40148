"""What CUDA's kernels allocate beyond their results, and ops that run otherwise on a card.

Sources are the CUDA files of PyTorch (aten/src/ATen/native/transformers/cuda) and the kernels of
bitsandbytes (backends/cuda/ops.py).
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from oomguard.prediction import int8

if TYPE_CHECKING:
    from oomguard.memory.cards import Card
    from oomguard.prediction.recorder import Recorder

Kernel = Callable[..., Any]
"""Stands in for an op, and what it allocates is recorded; `NotImplemented` leaves it to the op."""
Workspace = Callable[..., list[int]]
"""Bytes that an op's kernel allocates for itself, by `(out, *arguments)`."""

_ATEN = torch.ops.aten
# Past this many rows bitsandbytes dequantizes on every card (_gemm_4bit_custom_max_m).
_CUSTOM_ROWS = 1536
_PREFER_CUDNN = ((9, 0), (10, 0))
_CUDNN_WIDTH = 128  # of a head, in training: check_cudnn_tensor_shapes
_CUDNN_BYTES = 256


def up(value: int, multiple: int) -> int:
    """`value` rounded up to a multiple."""
    return -(-value // multiple) * multiple


class Matmul(NamedTuple):
    """A product with a 4-bit weight, before which bitsandbytes may dequantize it."""

    dtype: torch.dtype
    rows: int
    outputs: int
    width: int
    blocksize: int


def kernels(card: Card, recorder: Recorder) -> dict[Any, Kernel]:
    """Ops that a trace must answer for the card.

    Args:
        card: Which card.
        recorder: Told what is special about the memory that they take.
    """
    table: dict[Any, Kernel] = {
        _ATEN._local_scalar_dense.default: _item,
        _ATEN.equal.default: lambda *_: True,
        _ATEN.index.Tensor: _index(recorder),
        _ATEN._grouped_mm.default: _grouped_mm,
        _ATEN._scaled_dot_product_flash_attention_backward.default: _flash_backward(card, recorder),
    }
    if find_spec("bitsandbytes") is not None:
        import bitsandbytes  # noqa: F401 - registers its ops

        ops = torch.ops.bitsandbytes
        table[ops.gemm_4bit.default] = _gemm_4bit(recorder)
        table[ops.int8_vectorwise_quant.default] = int8.vectorwise_quant
        table[ops.int8_mixed_scaled_mm.default] = int8.mixed_scaled_mm
    return table


def workspaces() -> dict[Any, Workspace]:
    """Memory inside kernels."""
    return {
        _ATEN._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
        # softmax_backward_cuda_out of SoftMax.cu: grad * output.
        _ATEN._softmax_backward_data.default: lambda out, *_: [out.nbytes],
        # _safe_softmax of attention.cpp: the plain softmax, and where its input is -inf.
        _ATEN._safe_softmax.default: lambda out, *_: [out.nbytes, out.numel()],
    }


def _item(value: Tensor) -> Any:
    """Data is not known; any value will do, and a truth is true."""
    if value.dtype.is_floating_point:
        return 1.0
    return True if value.dtype == torch.bool else 1


def _index(recorder: Recorder) -> Kernel:
    def index(value: Tensor, indices: Any) -> Any:
        """`value[mask]`, at worst all of it; CUDA makes indices of the mask first (nonzero)."""
        mask = indices[0]
        if len(indices) != 1 or mask is None or mask.dtype != torch.bool:
            return NotImplemented
        count = recorder.targets if recorder.in_head else mask.numel()
        found = mask.new_empty((count, mask.ndim), dtype=torch.int64)
        return value.new_empty((len(found), *value.shape[mask.ndim :]))

    return index


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Any:
    """Products of groups of rows, whose shapes PyTorch infers for bfloat16 alone."""
    if a.dtype == torch.bfloat16 or a.ndim != 2:
        return NotImplemented
    groups = () if offs is None or b.ndim == 3 else (len(offs),)
    return a.new_empty(*groups, a.shape[0], b.shape[-1])


def _flash_backward(card: Card, recorder: Recorder) -> Kernel:
    """mha_bwd of flash_attn/flash_api.cpp: dq, dk, dv, softmax_d, dq_accum, dk and dv per head.

    Data-center cards since Hopper run cuDNN's kernel (check_prefer_cudnn_attention of
    sdp_utils.cpp), which takes as much in one block: so the log of an H100's allocator says.
    """
    in_one_block = card.capability in _PREFER_CUDNN

    def flash_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, heads, length, width = q.shape
        kv_heads, kv_length = k.shape[1], k.shape[2]
        grads = [torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v)]
        padded = up(length, 128)
        sizes = [rows * heads * padded * 4, rows * padded * heads * up(width, 32) * 4]
        if kv_heads != heads:
            sizes += [rows * kv_length * heads * width * q.element_size()] * 2
        one = in_one_block and width <= _CUDNN_WIDTH
        if one:
            sizes.append(_CUDNN_BYTES)
        with recorder.in_one_block() if one else nullcontext():
            scratch = [q.new_empty(size, dtype=torch.uint8) for size in sizes]
        del scratch
        return grads[0], grads[1], grads[2]

    return flash_backward


def _efficient_backward(out: Any, grad: Tensor, q: Tensor, *_: Any) -> list[int]:
    """attention_backward.cu: delta, and a float32 accumulator of dq for half precision."""
    rows, heads, length, width = q.shape
    delta = rows * heads * up(length, 32) * 4
    if q.dtype == torch.float32:
        return [delta]
    return [delta, rows * heads * up(length, 64) * up(width, 64) * 4]


def _gemm_4bit(recorder: Recorder) -> Kernel:
    """Dequantize and multiply; bitsandbytes' fused kernel takes nothing but its result."""

    def gemm_4bit(
        a: Tensor,
        b: Tensor,
        shape: Any,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        absmax_8bit: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        width, outputs = a.shape[-1], shape[0]
        with recorder.dequantizing(Matmul(a.dtype, a.numel() // width, outputs, width, blocksize)):
            if absmax_8bit is not None:
                scales = torch.empty_like(absmax_8bit, dtype=torch.float32)
                absmax = scales + 0.0  # the offset
            weight = a.new_empty(tuple(shape))
        out = torch.nn.functional.linear(a, weight, bias)
        del absmax, weight
        return out

    return gemm_4bit


def fused_4bit(card: Card, by: Matmul) -> bool:
    """Whether bitsandbytes multiplies without dequantizing; no, where the card is unknown."""
    if by.rows > _CUSTOM_ROWS or by.width % by.blocksize or card.capability is None:
        return False
    if card.multiprocessors is None:
        return False
    props = (card.multiprocessors, *card.capability)
    return bool(_heuristic()(props, by.dtype, by.rows, by.outputs, by.width))


@cache
def _heuristic() -> Callable[..., bool]:
    """Bitsandbytes' own `_gemm_4bit_use_custom_cuda`, taken from its source.

    Its module cannot be imported without CUDA. The function asks `_gpu_dispatch_props` for the
    card by the index it is given; here the properties themselves are given.
    """
    import bitsandbytes

    path = Path(bitsandbytes.__file__).parent / "backends" / "cuda" / "ops.py"
    tree = ast.parse(path.read_bytes(), path)
    wanted = ("_gemm_4bit_use_custom_cuda", "_GEMM_4BIT_CUSTOM_FLOOR_M")
    body = [node for node in tree.body if _defines(node, wanted)]
    for node in body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    names: dict[str, Any] = {"torch": torch, "_gpu_dispatch_props": lambda props: props}
    exec(compile(ast.Module(body, []), str(path), "exec"), names)  # noqa: S102 - installed source
    found: Callable[..., bool] = names[wanted[0]]
    return found


def _defines(node: ast.stmt, names: tuple[str, ...]) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name in names
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id in names for target in targets)
