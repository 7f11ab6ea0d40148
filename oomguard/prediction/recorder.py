"""Records every allocation and free of traced code, in program order."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oomguard.prediction import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oomguard.memory.cards import Card
    from oomguard.prediction.kernels import Matmul

Entry = tuple[str, Any, int | None]
"""`("a", id, layer)`, `("f", id, layer)`, `("m", phase, None)`, `("c", None, None)`, a chunk of the
language-model head, or `("p", None, layer)`, a thread's first product."""

HEAD = "head"
_MOST_OPS = 150_000  # some seven times what a hundred layers run, traced one by one
_ATEN = torch.ops.aten
# What cuBLAS computes, for which each thread has a workspace.
_PRODUCTS = frozenset(
    (_ATEN.mm.default, _ATEN.mm.out, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default)
)
_ADD = _ATEN.add.Tensor
_META = torch.device("meta")
_DEVICE = torch.ops.prim.device.default


class Recorder(TorchDispatchMode):
    """Writes the log of a trace.

    Args:
        card: Whose kernels run.
        count_scalars: Whether scalars made inside an optimizer step are on the card.

    Attributes:
        log: What happened; see `Entry`. A phase of `None` releases the allocator's cache.
        nbytes: Bytes of each id.
        part: `"head"` for ids of the language-model head and the loss, else the op.
        home: The layer that each id belongs to; `None` outside the layers.
        layer: The layer that runs now.
        in_head: Whether the language-model head or the loss runs now.
        in_backward: Whether autograd's backward runs now.
        stepping: Whether the optimizer runs now.
        paused: Whether nothing is recorded now.
        targets: Tokens that the language-model head takes.
        dequantized: The product of each id that is only taken if the product is not fused.
        blocks: Ids that are parts of one allocation.
    """

    supports_higher_order_operators = True

    def __init__(self, card: Card, *, count_scalars: bool) -> None:
        super().__init__()
        self._kernels = kernels.kernels(card, self)
        self._workspaces = kernels.workspaces()
        self._count_scalars = count_scalars
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.log: list[Entry] = []
        self.nbytes: list[int] = []
        self.part: list[str] = []
        self.home: list[int | None] = []
        self.layer: int | None = None
        self.in_head = False
        self.in_backward = False
        self.stepping = False
        self.paused = False
        self.targets = 0
        self.dequantized: dict[int, Matmul] = {}
        self.blocks: list[range] = []
        self._multiplied: set[bool] = set()  # by the main thread (False), by autograd's
        self._matmul: Matmul | None = None
        self._ops = 0

    def mark(self, phase: str | None) -> None:
        """A phase begins here."""
        self.log.append(("m", phase, None))
        self.layer = None

    def chunk(self) -> None:
        """The language-model head is at the beginning of a chunk of tokens."""
        self.log.append(("c", None, None))

    def allocate(self, nbytes: int, op: str) -> int:
        """Record an allocation, and return its id."""
        number = len(self.nbytes)
        self.nbytes.append(int(nbytes))
        self.part.append(HEAD if self.in_head else op)
        self.home.append(self.layer)
        self.log.append(("a", number, self.layer))
        if self._matmul is not None:
            self.dequantized[number] = self._matmul
        return number

    @contextmanager
    def dequantizing(self, matmul: Matmul) -> Iterator[None]:
        """What is allocated inside is only taken if `matmul` is not fused."""
        self._matmul = matmul
        yield
        self._matmul = None

    @contextmanager
    def in_one_block(self) -> Iterator[None]:
        """What is allocated inside are parts of one allocation."""
        first = len(self.nbytes)
        yield
        self.blocks.append(range(first, len(self.nbytes)))

    def free(self, number: int) -> None:
        """Record the free of an id."""
        self.log.append(("f", number, self.layer))

    def repeat(self, ids: range, log: list[Entry]) -> dict[int, int]:
        """Let what happened to `ids` in `log` happen once more; the new id of each."""
        new = {old: len(self.nbytes) + index for index, old in enumerate(ids)}
        tables: tuple[list[Any], ...] = self.nbytes, self.part, self.home
        for table in tables:
            table.extend(table[ids.start : ids.stop])
        again = {new[old]: by for old, by in self.dequantized.items() if old in new}
        self.dequantized.update(again)
        self.blocks += [
            range(new[block.start], new[block.start] + len(block))
            for block in self.blocks
            if block.start in new
        ]
        for kind, what, layer in log:
            if kind in {"m", "c"}:
                self.log.append((kind, what, layer))
            elif what in new:
                self.log.append((kind, new[what], layer))
        return new

    def adopt(self, tensor: torch.Tensor, number: int) -> None:
        """Let `tensor` stand for an id that lives."""
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = weakref.ref(storage, self._gone(storage._cdata)), number

    def id_of(self, tensor: torch.Tensor) -> int | None:
        """The id of a tensor's storage; `None` if it is not recorded."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return None if held is None else held[1]

    def stop(self) -> None:
        """Leave what is freed from now on out of the log."""
        self._held.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked for more often than all else
            fake = args[0]
            return _META if fake.fake_mode.in_kernel_invocation else fake.fake_device
        kwargs = kwargs or {}
        self._ops += 1
        if self._ops > _MOST_OPS:
            msg = f"it runs more than {_MOST_OPS:,} ops, as loops over tokens do"
            raise RuntimeError(msg)
        if self.paused:
            return func(*args, **kwargs)
        kernel = self._kernels.get(func)
        if kernel is not None:
            with self:
                out = kernel(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func is _ADD and self._accumulates(out, args):
            return out
        if self.stepping:
            self._see_step(args, out)
            return out
        self._see(out, func)
        if func in _PRODUCTS and self.in_backward not in self._multiplied:
            self._multiplied.add(self.in_backward)
            self.log.append(("p", None, self.layer))
        workspace = self._workspaces.get(func)
        if workspace is not None:
            numbers = [self.allocate(n, "workspace") for n in workspace(out, *args)]
            for number in numbers:
                self.free(number)
        return out

    def _see(self, out: Any, func: Any) -> None:
        if isinstance(out, torch.Tensor):
            if out.device.type == "meta":
                return
            storage = out.untyped_storage()
            key = storage._cdata
            if key not in self._held:
                number = self.allocate(storage.nbytes(), func.__name__)
                self._held[key] = weakref.ref(storage, self._gone(key)), number
        elif isinstance(out, (tuple, list)):
            for item in out:
                self._see(item, func)

    def _accumulates(self, out: torch.Tensor, args: Any) -> bool:
        """Whether autograd adds a second gradient to one that it holds.

        It does so in place, unless the tensors are of a subclass, as fake ones are, or the one that
        it holds shares its storage (can_accumulate_inplace of input_buffer.cpp): a view keeps what
        it is a view of.
        """
        if not self.in_backward or torch.is_grad_enabled():
            return False
        one, other = args[:2]
        if not isinstance(other, torch.Tensor) or one.shape != other.shape or one._is_view():
            return False
        held = self._held.pop(one.untyped_storage()._cdata, None)
        if held is None:
            return False
        storage = out.untyped_storage()
        self._held[storage._cdata] = weakref.ref(storage, self._gone(storage._cdata)), held[1]
        return True

    def _gone(self, key: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            held = self._held.pop(key, None)
            if held is not None:
                self.free(held[1])

        return gone

    def _see_step(self, args: Any, out: Any) -> None:
        """What an optimizer makes belongs to the layer of the tensor it is made from."""
        many = isinstance(out, (tuple, list))
        for index, item in enumerate(out if many else [out]):
            if not isinstance(item, torch.Tensor) or (item.dim() == 0 and not self._count_scalars):
                continue
            for source in args:
                one = source[index] if isinstance(source, (tuple, list)) and many else source
                number = self.id_of(one) if isinstance(one, torch.Tensor) else None
                if number is not None:
                    self.layer = self.home[number]
                    break
            self._see(item, torch.ops.aten.empty_like.default)
