"""What counts as out of memory, what it holds, and what every other error meets on its way."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainerCallback, set_seed
from trl import SFTTrainer

import oomguard
from oomguard import LadderExhaustedError, oom
from oomguard.memory.size import parse_bytes
from oomguard.retry import off_card
from oomguard.testing import VirtualCard
from tests import tiny
from tests.test_every_allocation import LoggingCard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from oomguard.event import OOMEvent
    from oomguard.plan import Plan

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 12.75 MiB is free. Process 4711 has 77.00 GiB memory in use. Including non-PyTorch "
    "memory, this process has 2.10 GiB memory in use. {allowed}Of the allocated memory 1.50 GiB is "
    "allocated by PyTorch, with 24.00 MiB allocated in private pools (e.g., CUDA Graphs), and "
    "100.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
    "documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
)
OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError(CUDA.format(allowed="")),
    "huge": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than 1EB memory."),
    "bare": torch.OutOfMemoryError(),
    "raised anew": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError(),
    "numpy": MemoryError("Unable to allocate 7.28 TiB for an array with shape (10**12,)"),
    "driver": torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some "
        "other API call, so the stacktrace below might be incorrect."
    ),
    "cublas": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "nccl": RuntimeError(
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, unhandled cuda "
        "error, NCCL version 2.27.3\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'"
    ),
    "nccl's own": RuntimeError("NCCL WARN Failed to CUDA calloc 4194304 bytes"),
    "bitsandbytes": RuntimeError(
        "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"
    ),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "cpu on windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you "
        "tried to allocate 1536 bytes."
    ),
    "mps": RuntimeError(
        "MPS backend out of memory (MPS allocated: 8.00 GiB, other allocations: 1.00 GiB, max "
        "allowed: 9.07 GiB). Tried to allocate 256.00 MiB on private pool."
    ),
    "xpu": RuntimeError(
        "XPU out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 16.00 GiB."
    ),
    "level zero": RuntimeError("level_zero backend failed: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
    "hip": RuntimeError("HIP out of memory. Tried to allocate 1.50 GiB."),
    "hip driver": RuntimeError("HIP error: out of memory"),
    "npu": RuntimeError(
        "NPU out of memory. Tried to allocate 52.00 MiB (NPU 0; 60.96 GiB total capacity; "
        "59.36 GiB already allocated; 10.00 MiB free; 59.90 GiB reserved in total by PyTorch)"
    ),
    "hpu": RuntimeError(
        "[Rank:0] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::268435456 (256)MB"
    ),
}
OTHER = {
    "triton": RuntimeError(
        "out of resource: shared memory, Required: 147456, Hardware limit: 101376. Reducing block "
        "sizes or `num_stages` may help."
    ),
    "inductor": RuntimeError(
        "No valid triton configs. OutOfMemoryError: out of resource: triton_red_fused_0 Required: "
        "264192 Hardware limit: 232448 Reducing block sizes or `num_stages` may help."
    ),
    "illegal access": torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered"
    ),
    "assert": torch.AcceleratorError("CUDA error: device-side assert triggered"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "nccl": RuntimeError("NCCL error: unhandled system error, NCCL version 2.27.3"),
    "hpu is taken": RuntimeError("synStatus=8 [Device not found] Device acquire failed."),
    "host": OSError(12, "Cannot allocate memory"),
    "value": ValueError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "shapes": RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
    "the user's": RuntimeError("the queue is out of memory slots"),
    "exhausted": LadderExhaustedError(CUDA.format(allowed="")),
    "interrupt": KeyboardInterrupt(),
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_an_out_of_memory_is_one_whatever_its_type(name: str) -> None:
    facts = oom.classify(OUT_OF_MEMORY[name])
    assert facts is not None
    assert facts.message
    assert "\n" not in facts.message


@pytest.mark.parametrize("name", OTHER)
def test_any_other_error_is_none(name: str) -> None:
    assert oom.classify(OTHER[name]) is None


def test_its_numbers_are_read() -> None:
    facts = oom.classify(OUT_OF_MEMORY["cuda"])
    assert facts is not None
    assert facts.asked_bytes == 20 * 2**20
    assert facts.free_bytes == parse_bytes("12.75 MiB")
    assert facts.total_bytes == parse_bytes("79.11 GiB")
    assert facts.message.startswith("CUDA out of memory. Tried")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("cpu", 8_000_000_000),
        ("cpu on windows", 1536),
        ("mps", 2**28),
        ("xpu", 2**31),
        ("hip", 3 * 2**29),
        ("npu", 52 * 2**20),
        ("huge", None),
        ("bare", None),
        ("python", None),
        ("cublas", None),
    ],
)
def test_what_was_asked_for_is_read_where_it_is_said(name: str, asked: int | None) -> None:
    facts = oom.classify(OUT_OF_MEMORY[name])
    assert facts is not None
    assert (facts.asked_bytes, facts.free_bytes) == (asked, None)


def test_under_a_memory_fraction_what_is_allowed_is_the_limit() -> None:
    # torch.cuda.set_per_process_memory_fraction: 1.50 GiB and 100 MiB of it are taken.
    text = CUDA.replace("12.75 MiB is free", "60.00 GiB is free")
    facts = oom.classify(torch.OutOfMemoryError(text.format(allowed="2.00 GiB allowed; ")))
    assert facts is not None
    assert facts.free_bytes == (512 - 100) * 2**20
    assert facts.total_bytes == parse_bytes("79.11 GiB")
    facts = oom.classify(torch.OutOfMemoryError(text.format(allowed="1.25 GiB allowed; ")))
    assert facts is not None
    assert facts.free_bytes == 0


def test_what_a_virtual_card_says_is_read() -> None:
    with (
        VirtualCard("1MiB"),
        pytest.raises(torch.OutOfMemoryError) as raised,
    ):
        _ = [torch.empty(100 * 2**10, dtype=torch.uint8) for _ in range(11)]
    facts = oom.classify(raised.value)
    assert facts is not None
    assert (facts.asked_bytes, facts.free_bytes) == (100 * 2**10, 24 * 2**10)
    assert facts.total_bytes == 2**20


def test_an_error_that_was_raised_from_one_is_the_users_answer_to_it() -> None:
    error = ValueError("this batch is too long")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert oom.classify(error) is None
    reverse = torch.OutOfMemoryError("CUDA out of memory.")
    reverse.__context__ = ValueError("no value")
    assert oom.classify(reverse) is not None


# What it holds.


def failing_step(pinned: list[weakref.ref[torch.Tensor]], depth: int = 2) -> None:
    activation = torch.ones(3)
    pinned.append(weakref.ref(activation))
    if depth:
        failing_step(pinned, depth - 1)
    else:
        raise torch.OutOfMemoryError(CUDA.format(allowed=""))


def failing_chain(pinned: list[weakref.ref[torch.Tensor]], *, explicit: bool) -> None:
    """The error of the card, and another one made of it or met while it was handled."""
    try:
        failing_step(pinned)
    except torch.OutOfMemoryError as error:
        batch = torch.ones(3)
        pinned.append(weakref.ref(batch))
        message = "CUDA error: out of memory"
        if explicit:
            raise RuntimeError(message) from error
        raise RuntimeError(message)  # noqa: B904 - as code does that meets a second one


@pytest.mark.parametrize(
    "fail",
    [
        failing_step,
        partial(failing_chain, explicit=True),
        partial(failing_chain, explicit=False),
    ],
)
@pytest.mark.parametrize("kept", ["nothing", "error", "traceback"])
def test_released_tensors_of_the_failed_frames_are_freed(
    fail: Callable[[list[weakref.ref[torch.Tensor]]], None], kept: str
) -> None:
    pinned: list[weakref.ref[torch.Tensor]] = []
    stored: list[Any] = []
    gc.disable()  # freed by what `release` cuts, not by chance
    try:
        try:
            fail(pinned)
        except RuntimeError as error:
            if kept != "nothing":
                stored.append(error if kept == "error" else error.__traceback__)
            assert any(ref() is not None for ref in pinned)
            oom.release(error)
        assert len(pinned) >= 3
        assert all(ref() is None for ref in pinned)
    finally:
        gc.enable()


def test_a_ring_of_errors_is_released() -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__context__, other.__context__ = other, one
    oom.release(one)
    assert one.__context__ is None
    assert other.__context__ is None
    oom.release(None)


# What a training does with errors.


class Faulty(SFTTrainer):
    """Raises what it is told to at the second step, before or after a part of its work."""

    def __init__(self, *args: Any, fault: BaseException | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault = fault

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.fault is not None and self.state.global_step == 1:
            fault, self.fault = self.fault, None
            raise fault
        return loss


def make(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "model": tiny.llama(num_hidden_layers=1),
        "dataset": tiny.text_dataset(12),
        "per_device_train_batch_size": 1,
        "max_length": 24,
        "max_steps": 3,
        "trainer_class": Faulty,
        "optim": "adamw_torch",
    }
    return tiny.sft_trainer(folder, **{**settings, **changes})


NOT_OURS: list[BaseException] = [
    ValueError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    KeyError("labels"),
    KeyboardInterrupt(),
    SystemExit(3),
]


@pytest.mark.parametrize("fault", NOT_OURS, ids=lambda fault: type(fault).__name__)
def test_errors_that_are_no_out_of_memory_pass_untouched(
    fault: BaseException, tmp_path: Path
) -> None:
    fault = copy.copy(fault)
    fault.__cause__ = cause = OverflowError("deep inside")
    trainer = make(tmp_path, trainer_arguments={"fault": fault})
    guard = oomguard.Guard(trainer)
    with pytest.raises(type(fault)) as raised, guard:
        trainer.train()
    assert raised.value is fault
    assert fault.__cause__ is cause
    assert "compute_loss" in [entry.name for entry in raised.traceback]
    assert trainer.__class__ is Faulty
    assert not guard.report.recoveries
    assert guard.report.status == "failed" if isinstance(fault, Exception) else "interrupted"
    assert guard.report.error == f"{type(fault).__name__}: {fault}"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = make(tmp_path_factory.mktemp("twin"))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "name", sorted(OUT_OF_MEMORY.keys() - {"cpu on windows", "nccl's own", "hip", "hip driver"})
)
def test_a_step_is_made_again_after_any_of_them(name: str, twin: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path, trainer_arguments={"fault": copy.copy(OUT_OF_MEMORY[name])})
    (recovery,) = oomguard.fit(trainer).recoveries
    assert recovery.event.message
    assert tiny.largest_difference(tiny.weights(twin), tiny.weights(trainer)) == 0


class LastWeights(TrainerCallback):
    """Keeps the weights of the last complete step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.states: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with off_card():
            self.weights = [p.detach().clone() for p in kwargs["model"].parameters()]
            self.states = copy.deepcopy(list(kwargs["optimizer"].state.values()))


class InterruptBeforeStep(TrainerCallback):
    """Ctrl-C between two steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.step = 0
            raise KeyboardInterrupt


PLACES = ["rung", "lever", "garbage collection"]


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


class Interrupted(oomguard.Rung):
    fidelity = oomguard.Fidelity.EXACT
    relieves_optimizer = True

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Phase and step of every allocation."""
    card = LoggingCard(make)
    trainer = card.build(tmp_path_factory.mktemp("places"))
    with card:
        oomguard.fit(trainer)
    return card.places


@pytest.mark.parametrize(
    ("phase", "step", "place"),
    [
        *product(["fetch", "forward", "backward"], [2], PLACES),
        *product(["optimizer"], [1], ["rung", "garbage collection"]),
        ("clip", 2, "garbage collection"),
    ],
)
def test_an_interrupt_during_a_recovery_leaves_the_last_complete_step(
    phase: str,
    step: int,
    place: str,
    places: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [number for number, where in enumerate(places, 1) if where == (phase, step)]
    card = VirtualCard(fail_at=found[len(found) // 2])
    trainer, kept = make(tmp_path), LastWeights()
    untrained = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.add_callback(kept)
    ladder = oomguard.Ladder(Interrupted() if place == "rung" else oomguard.CheckpointActivations())
    guard = oomguard.Guard(trainer, ladder=ladder)
    if place == "lever":
        monkeypatch.setattr("oomguard.levers.activations.enable", interrupt)
    elif place == "garbage collection":
        monkeypatch.setattr("oomguard.memory.device.gc", SimpleNamespace(collect=interrupt))
    with pytest.raises(KeyboardInterrupt), card, guard:
        trainer.train()
    monkeypatch.undo()
    left: Any = type(trainer)
    assert left is Faulty
    assert (guard.report.status, guard.report.error) == ("interrupted", "KeyboardInterrupt: ")
    weights = [p.detach() for p in trainer.model.parameters()]
    torch.testing.assert_close(weights, kept.weights or untrained, rtol=0, atol=0)
    states = [state for state in trainer.optimizer.state.values() if state]
    torch.testing.assert_close(states, kept.states, rtol=0, atol=0)
    assert trainer.state.global_step == step - 1

    # Both begin once more, one of them after a recovery that was interrupted.
    plain = make(tmp_path)
    plain.add_callback(InterruptBeforeStep(step))
    with pytest.raises(KeyboardInterrupt):
        plain.train()
    set_seed(5)
    plain.train()
    set_seed(5)
    assert oomguard.fit(trainer).status == "finished"
    assert tiny.largest_difference(tiny.weights(plain), tiny.weights(trainer)) == 0


class Broken(oomguard.Rung):
    fidelity = oomguard.Fidelity.EXACT
    relieves_optimizer = True

    def __call__(self, plan: Plan, event: OOMEvent) -> Plan:
        message = "this rung has a bug"
        raise ZeroDivisionError(message)


@pytest.mark.parametrize("rung", [Interrupted(), Broken()], ids=["interrupt", "error"])
def test_an_error_during_a_recovery_leaves_no_later_step_half_done(
    rung: oomguard.Rung, places: list[tuple[str, int]], tmp_path: Path
) -> None:
    plain, kept = make(tmp_path, max_steps=2, lr_scheduler_type="constant"), LastWeights()
    plain.add_callback(kept)
    plain.train()
    found = [number for number, where in enumerate(places, 1) if where == ("optimizer", 2)]
    trainer = make(tmp_path, lr_scheduler_type="constant")
    error = KeyboardInterrupt if isinstance(rung, Interrupted) else ZeroDivisionError
    with pytest.raises(error), VirtualCard(fail_at=found[len(found) // 2]):
        oomguard.fit(trainer, ladder=oomguard.Ladder(rung))
    weights = [p.detach() for p in trainer.model.parameters()]
    torch.testing.assert_close(weights, kept.weights, rtol=0, atol=0)
    states = list(trainer.optimizer.state.values())
    torch.testing.assert_close(states, kept.states, rtol=0, atol=0)
