"""Try things on this machine: every rung in a training of two steps, the 8-bit optimizer."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from oomguard import rng
from oomguard.errors import LadderExhaustedError
from oomguard.guard import Guard
from oomguard.ladder import Ladder
from oomguard.memory import device
from oomguard.rung import RungLike, rung_fidelity, rung_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROWS, _TOKENS, _VOCABULARY = 4, 512, 64


@dataclass(frozen=True)
class RungTrial:
    """What a rung does, and whether it did so here.

    Attributes:
        name: The rung's.
        fidelity: What it does to the result.
        does: The first sentence of its description.
        change: What it changed in the trial; empty where it did not act.
        why_not: Why it did not act, or what failed; empty where it acted.
        failed: Whether it was to act here and failed.
    """

    name: str
    fidelity: str
    does: str
    change: str = ""
    why_not: str = ""
    failed: bool = False


class _FailsOnce(Trainer):
    """Runs out of memory in the forward pass of its second step, once."""

    failed = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and not self.failed:
            self.failed = True
            msg = "CUDA out of memory. Tried to allocate 1.00 GiB. (a trial)"
            raise torch.OutOfMemoryError(msg)
        return super().compute_loss(*args, **kwargs)


def try_rung(rung: RungLike) -> RungTrial:
    """Fine-tune a tiny Llama with LoRA on this machine's device, with `rung` the whole ladder."""
    description = (rung.__doc__ or "").strip().split("\n\n")[0]
    does = " ".join(description.split()).rstrip(".")
    name, fidelity = rung_name(rung), rung_fidelity(rung).value
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(folder)
        guard = Guard(trainer, ladder=Ladder(rung))
        try:
            with guard:
                trainer.train()
        except LadderExhaustedError as error:
            reason = str(error).partition(f"Left out: {name}: ")[2].partition(". Nothing of")[0]
            return RungTrial(name, fidelity, does, why_not=reason or str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            why = f"{type(error).__name__}: {_first_line(error)}"
            return RungTrial(name, fidelity, does, why_not=why, failed=True)
    recovery = guard.report.recoveries[0]
    change = recovery.before.describe_change(recovery.after).partition(", effective batch")[0]
    return RungTrial(name, fidelity, does, change=change)


def try_8bit_optimizer() -> str | None:
    """Make a step of bitsandbytes' 8-bit AdamW; why that failed, or `None`."""
    try:
        from bitsandbytes.optim.adamw import AdamW8bit

        place = torch.accelerator.current_accelerator() or torch.device("cpu")
        weights = torch.nn.Parameter(torch.ones(64, 64, device=place))
        weights.grad = torch.ones_like(weights)
        AdamW8bit([weights], lr=0.1, min_8bit_size=0).step()
        if not bool((weights < 1).all()):
            return "a step of AdamW8bit left weights as they were"
    except Exception as error:  # noqa: BLE001 - libraries of its own may be missing in any way
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _trainer(folder: str) -> Trainer:
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=_TOKENS,
    )
    lora = LoraConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = torch.arange(2 * _ROWS * _TOKENS).reshape(-1, _TOKENS) % _VOCABULARY
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=_ROWS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=len(device.devices()) != 1,  # of several, the Trainer would make a DataParallel
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    return _FailsOnce(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the trial prints and logs; random numbers are put back."""
    state, level = rng.snapshot(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(level)
        rng.restore(state)
