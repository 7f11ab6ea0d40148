"""Two optimizer steps of the real code on fake tensors."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from oomguard.prediction import optimizers
from oomguard.prediction.follow import sft_stand_in
from oomguard.prediction.losses import Loss
from oomguard.prediction.prepared import Prepared
from oomguard.prediction.recorder import Entry, Recorder
from oomguard.prediction.world import patched, world

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from transformers import PretrainedConfig

    from oomguard.memory.cards import Card
    from oomguard.plan import Plan
    from oomguard.prediction.kernels import Matmul
    from oomguard.prediction.layers import Cut
    from oomguard.prediction.optimizers import Own
    from oomguard.prediction.settings import Settings
    from oomguard.prediction.shape import Shape
    from oomguard.prediction.tuning import Tuning


class Given(NamedTuple):
    """What a live trainer has that no plan names, and notes on what is not traced of it."""

    optimizer: Own | None = None
    tuning: Tuning | None = None
    loss: Loss = Loss()
    notes: tuple[str, ...] = ()


NOTHING = Given()
LOAD, FORWARD, BACKWARD, STEP = "load", "forward", "backward", "optimizer step"
END = "end of step"


@dataclass
class Trace:
    """The log of two optimizer steps of a shortened model.

    Attributes:
        log: See `recorder.Entry`; phases are `"load"`, `"forward"`, `"backward"` and
            `"optimizer step"`.
        nbytes: Bytes of each id.
        part: What made each id.
        home: The unit of layers that each id belongs to.
        kind: `"weights"`, `"adapters"` or `"gradients"` of the ids that are that.
        cut: How the model was shortened; `None` if it was not.
        sized: The ids of the first step's passes, in order.
        alike: Ids of the second step's passes, each with the one of the first step that it repeats.
        probes: Bytes of the ids of `sized` in passes of other shapes.
        dequantized: The product of each id that is only taken if the product is not fused.
        blocks: Ids that are parts of one allocation.
    """

    log: list[Entry]
    nbytes: list[int]
    part: list[str]
    home: list[int | None]
    kind: dict[int, str]
    cut: Cut | None
    sized: list[int]
    alike: dict[int, int]
    probes: list[list[int]]
    dequantized: dict[int, Matmul]
    blocks: list[range]


def trace(
    config: PretrainedConfig,
    plan: Plan,
    settings: Settings,
    card: Card,
    shapes: Sequence[Shape],
    *,
    given: Given = NOTHING,
    whole: bool = False,
) -> Trace:
    """Trace two steps in passes of the first shape, and one more pass of each of the others.

    Args:
        config: Of the model.
        plan: What is trained.
        settings: What is trained, besides the plan.
        card: On which.
        shapes: Of the passes.
        given: What is trained, and by which optimizer, where `plan` does not say it.
        whole: Whether every layer is traced, not the few that stand for all.

    Raises:
        Exception: Whatever the model's own code raises on fake tensors.
    """
    args = optimizers.arguments(plan.optim or "adamw_torch_fused")
    own = given.optimizer
    fused = "fused" in args.optim.value if own is None else bool(own.kwargs.get("fused"))
    recorder = Recorder(card, count_scalars=fused or card.is_host)
    padded, packed = settings.padded, settings.packing
    with (
        _quiet(),
        world(card, padded=padded, packed=packed, on_chunk=recorder.chunk),
        optimizers.on_card(),
    ):
        tuning = given.tuning
        made = Prepared(config, plan, settings, card, recorder, tuning=tuning, whole=whole)
        optimizer = partial(optimizers.create, args=args, own=own)
        return _Run(plan, settings, card, optimizer, given.loss, recorder, made).trace(shapes)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of a run that is none."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Run:
    """One trace: the objects of a training run and the recorder that watches them."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        card: Card,
        optimizer: Callable[[nn.Module], Any],
        loss: Loss,
        recorder: Recorder,
        made: Prepared,
    ) -> None:
        self._given_loss = loss
        self._plan, self._settings, self._card = plan, settings, card
        self._optimizer, self._recorder, self._made = optimizer, recorder, made

    def trace(self, shapes: Sequence[Shape]) -> Trace:
        recorder, passes = self._recorder, min(2, self._plan.passes_per_step)
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            recorder.mark(LOAD)
            self._made.load()
            optimizer = self._optimizer(self._made.model)
            if not self._card.is_host:
                optimizers.use_foreach(optimizer)
            self._made.autocast()
            self._made.model.train()
            # Trainer.train begins with Accelerator.free_memory.
            recorder.mark(None)
            begun = len(recorder.log)
            first = self._passes(passes, shapes[0])
            log = recorder.log[begun:]
            gradients = self._step(optimizer)
            # The passes of the second step do what those of the first did.
            again = recorder.repeat(first, log)
            self._take_gradients({p: again[number] for p, number in gradients.items()})
            self._step(optimizer)
            recorder.mark("end")
            logged = len(recorder.log)
            probes = []
            for shape in shapes[1:]:
                probes.append(self._passes(passes, shape))
                self._made.model.zero_grad()
            recorder.stop()
        return Trace(
            recorder.log[:logged],
            recorder.nbytes,
            recorder.part,
            recorder.home,
            self._made.kind,
            self._made.cut,
            sized=list(first),
            alike={new: old for old, new in again.items()},
            probes=[[recorder.nbytes[i] for i in probe] for probe in probes],
            dequantized=recorder.dequantized,
            blocks=recorder.blocks,
        )

    def _passes(self, passes: int, shape: Shape) -> range:
        """The ids of the passes of one step."""
        first = len(self._recorder.nbytes)
        for _ in range(passes):
            with self._in_chunks(shape.chunk_tokens):
                self._recorder.targets = shape.targets
                self._pass(shape.rows, shape.length)
        return range(first, len(self._recorder.nbytes))

    def _in_chunks(self, tokens: int) -> AbstractContextManager[None]:
        """TRL's language-model head takes as many tokens at once."""
        if self._settings.trainer != "sft":
            return nullcontext()
        import trl.kernels.chunked_logprob as head

        return patched(head, TOKEN_CHUNK_SIZE=tokens)

    def _take_gradients(self, numbers: dict[nn.Parameter, int]) -> None:
        recorder = self._recorder
        recorder.paused = True
        for parameter, number in numbers.items():
            parameter.grad = torch.empty_like(parameter)
            recorder.adopt(parameter.grad, number)
        recorder.paused = False

    def _pass(self, rows: int, length: int) -> None:
        recorder = self._recorder
        recorder.mark(FORWARD)
        inputs = self._inputs(rows, length)
        loss = self._loss(inputs)
        del inputs
        recorder.mark(BACKWARD)
        recorder.in_head = recorder.in_backward = True
        loss.backward()
        recorder.in_head = recorder.in_backward = False
        # What nodes hold outside of saved tensors, as bitsandbytes' do, goes with the whole graph.
        recorder.layer = None
        del loss

    def _inputs(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """A batch as TRL's collators name it."""
        names = ["input_ids", "labels", "attention_mask"]
        if self._settings.packing:
            names[2] = "position_ids"
        return {name: self._integers(rows, length) for name in names}

    def _integers(self, *shape: int) -> torch.Tensor:
        """What the Trainer's loop gives to a pass; on the host `loop` counts it."""
        tensor = torch.empty(shape, dtype=torch.int64)
        number = self._recorder.id_of(tensor)
        if self._card.is_host and number is not None:
            self._recorder.nbytes[number] = 0
        return tensor

    def _loss(self, inputs: dict[str, torch.Tensor]) -> Any:
        items = self._integers()
        model = self._made.model
        if self._settings.trainer != "sft":
            return self._given_loss.of_logits(model, inputs, items)
        from trl import SFTTrainer

        stand_in = sft_stand_in(model, self._made.config, self._given_loss)
        return SFTTrainer.compute_loss(stand_in, model, inputs, num_items_in_batch=items)

    def _copies(self, gradients: dict[nn.Parameter, int]) -> Iterator[torch.Tensor]:
        """Every gradient as often as the deep model has it."""
        for parameter, number in gradients.items():
            cut = self._made.cut
            cloned = cut is not None and self._recorder.home[number] == cut.cloned
            for _ in range(cut.times if cut is not None and cloned else 1):
                yield parameter

    def _step(self, optimizer: Any) -> dict[nn.Parameter, int]:
        """Clip, step, and drop the gradients; the id of each parameter's."""
        recorder, model = self._recorder, self._made.model
        recorder.mark(STEP)
        trained = [p for p in model.parameters() if p.requires_grad]
        numbers = {p: recorder.id_of(p.grad) for p in trained if p.grad is not None}
        gradients = {p: number for p, number in numbers.items() if number is not None}
        self._made.kind.update(dict.fromkeys(gradients.values(), "gradients"))
        recorder.stepping = True
        if self._settings.max_grad_norm:
            for nbytes in optimizers.norm_bytes(self._copies(gradients)):
                recorder.free(recorder.allocate(nbytes, "norms"))
            nn.utils.clip_grad_norm_(trained, self._settings.max_grad_norm)
        optimizer.step()
        recorder.stepping = False
        recorder.mark(END)
        model.zero_grad()
        return gradients
