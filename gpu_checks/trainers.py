"""Real out-of-memory errors in TRL's other trainers, and in evaluation, on one NVIDIA GPU.

    python -m gpu_checks.trainers --out trainers.json --markdown trainers.md

measures on a GPU of about 20 GB or more; with `--tiny` the same code trains tiny models on the CPU.
Exits with 1 if a section crashed or found something that must not be.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, PrinterCallback, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from gpu_checks.report import Check
from gpu_checks.sections import Comparison, Result
from gpu_checks.text import text, tokenizer
from gpu_checks.workload import LLAMA_190M, TINY, Job, model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import TrainerCallback

    from gpu_checks.sections import Bench

_STEPS = 4
_SHARE = 0.6  # of the memory that the training takes without a limit
_EVAL_APART = 0.02  # relative, of models that bf16 on a GPU has led a little apart


@dataclass(frozen=True)
class OtherJob:
    """A run of one of TRL's trainers: LoRA r=16 on all linear layers, without checkpointing.

    Attributes:
        make: Builds the trainer from this job and the settings that all have.
        tiny: Whether models are tiny and on the CPU.
    """

    make: Callable[[OtherJob, dict[str, Any]], Any]
    tiny: bool

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return _STEPS

    @property
    def train(self) -> str:
        """Mixed precision."""
        return "fp64" if self.tiny else "bf16"

    @property
    def rows(self) -> int:
        """`per_device_train_batch_size`."""
        return 4 if self.tiny else 16

    @property
    def characters(self) -> int:
        """Of a text; a token has about three."""
        return 120 if self.tiny else 2400

    def base(self) -> Any:
        """The model; the same weights every time."""
        size = TINY if self.tiny else LLAMA_190M
        values: dict[str, Any] = {"optim": "adamw_torch_fused", "on_cpu": self.tiny, "lora": True}
        return model(
            Job(model=size, load=self.train, train=self.train, batches=(), accumulation=1, **values)
        )

    def texts(self, count: int, share: float = 1.0) -> list[str]:
        """Pieces of real text, of `share` of the length, give or take half of it."""
        draw, longest = random.Random(0), int(share * self.characters)  # noqa: S311 - lengths
        starts = [draw.randrange(len(text()) - longest) for _ in range(count)]
        return [text()[at : at + draw.randint(longest // 2, longest)] for at in starts]

    def build(self, folder: Path, callbacks: list[TrainerCallback]) -> Any:
        """The trainer."""
        set_seed(0)
        settings = {
            "output_dir": str(folder),
            "per_device_train_batch_size": self.rows,
            "max_steps": _STEPS,
            "learning_rate": 1e-4,
            "activation_checkpointing": False,
            "bf16": not self.tiny,
            "use_cpu": self.tiny,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer = self.make(self, settings)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def given(self, task: str = "CAUSAL_LM") -> dict[str, Any]:
        """What all trainers are given besides model, data and settings."""
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)
        return {"processing_class": tokenizer(512 if self.tiny else 8192), "peft_config": lora}


def _pairs(job: OtherJob) -> Dataset:
    count = job.rows * _STEPS
    prompts, chosen = job.texts(count, 0.3), job.texts(2 * count)
    return Dataset.from_dict(
        {"prompt": prompts, "chosen": chosen[:count], "rejected": chosen[count:]}
    )


def _dpo(job: OtherJob, settings: dict[str, Any]) -> Any:
    args = DPOConfig(**settings, max_length=1024)
    return DPOTrainer(job.base(), args=args, train_dataset=_pairs(job), **job.given())


def _kto(job: OtherJob, settings: dict[str, Any]) -> Any:
    pairs = _pairs(job).rename_column("chosen", "completion").remove_columns("rejected")
    rows = pairs.add_column("label", [index % 2 == 0 for index in range(len(pairs))])
    # The default loss compares with other rows of the batch, so that it cannot be split.
    args = KTOConfig(**settings, max_length=1024, loss_type="apo_zero_unpaired")
    return KTOTrainer(job.base(), args=args, train_dataset=rows, **job.given())


def _reward(job: OtherJob, settings: dict[str, Any]) -> Any:
    base = job.base()
    config = base.config
    config.num_labels = 1
    set_seed(0)
    judge = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
    args = RewardConfig(**settings, max_length=1024)
    pairs = _pairs(job).remove_columns("prompt")
    return RewardTrainer(judge, args=args, train_dataset=pairs, **job.given("SEQ_CLS"))


def _variety(completions: list[str], **_: Any) -> list[float]:
    return [len(set(words)) / 10 + 0.01 * len(words) for words in completions]


def _sampled(trainer: Any, config: Any, job: OtherJob, settings: dict[str, Any]) -> Any:
    prompts = Dataset.from_dict({"prompt": job.texts(job.rows * _STEPS, 0.3)})
    longest = 8 if job.tiny else 64
    args = config(**settings, num_generations=4, max_completion_length=longest)
    return trainer(
        job.base(), reward_funcs=_variety, args=args, train_dataset=prompts, **job.given()
    )


def _right(logits: Any, labels: Any) -> Any:
    return logits.argmax(-1)


def _share_right(prediction: Any) -> dict[str, float]:
    made, wanted = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"right": float((made == wanted)[wanted != -100].mean())}


def _evaluated(job: OtherJob, settings: dict[str, Any]) -> Any:
    """Trains on few rows and evaluates many at once, with all of their logits."""
    held_out = Dataset.from_dict({"text": job.texts(8 * job.rows)})
    few = {**settings, "per_device_train_batch_size": max(1, job.rows // 16)}
    args = SFTConfig(
        **few, max_length=1024, eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=4 * job.rows,
    )  # fmt: skip
    return SFTTrainer(
        job.base(),
        args=args,
        train_dataset=Dataset.from_dict({"text": job.texts(job.rows * _STEPS)}),
        eval_dataset=held_out,
        compute_metrics=_share_right,
        preprocess_logits_for_metrics=_right,
        **job.given(),
    )


MAKE: dict[str, Callable[[OtherJob, dict[str, Any]], Any]] = {
    "dpo": _dpo,
    "kto": _kto,
    "reward": _reward,
    "grpo": partial(_sampled, GRPOTrainer, GRPOConfig),
    "rloo": partial(_sampled, RLOOTrainer, RLOOConfig),
}


def _trained(bench: Bench, name: str) -> Result:
    """A training with the process limited to a share of what it took without a limit."""
    compared = Comparison.start(bench, OtherJob(MAKE[name], bench.scale.tiny))
    limit_bytes = int(_SHARE * compared.twin.peak_allocated_bytes)
    plain = bench.run(compared.job, limit_bytes=limit_bytes)
    compared.add(f"no guard, {_SHARE:.0%}", plain, limit_bytes)
    if plain.error is None:
        compared.result.failures.append(f"{_SHARE:.0%} is enough without a guard")
    trial = bench.run(compared.job, ladder="exact_first", limit_bytes=limit_bytes)
    compared.judge(f"exact_first, {_SHARE:.0%}", trial, limit_bytes)
    return compared.finish()


def _section(name: str) -> Callable[[Bench], Result]:
    def section(bench: Bench) -> Result:
        return _trained(bench, name)

    section.__doc__ = f"TRL's {name.upper()} trainer. {_trained.__doc__}"
    return section


def evaluation(bench: Bench) -> Result:
    """SFT whose evaluation, not its training, takes more than there is."""
    compared = Comparison.start(bench, OtherJob(_evaluated, bench.scale.tiny))
    limit_bytes = int(_SHARE * compared.twin.peak_allocated_bytes)
    trial = bench.run(compared.job, ladder="exact_first", limit_bytes=limit_bytes)
    compared.judge(f"exact_first, {_SHARE:.0%}", trial, limit_bytes)
    phases = {row["phase"] for row in compared.recoveries}
    if phases != {"evaluate"}:
        compared.result.failures.append(f"memory ran out in {phases}, not in evaluation")
    last: list[dict[str, float]] = [run.evaluations[-1] for run in (compared.twin, trial)]
    names = ("eval_loss", "eval_right")
    compared.result.failures += [
        f"{name} is {last[1][name]}, without a limit {last[0][name]}"
        for name in names
        if not abs(last[1][name] - last[0][name]) <= _EVAL_APART * abs(last[0][name])
    ]
    result = compared.finish()
    result.tables["Metrics of the last evaluation"] = [
        {"metric": name, "no_limit": last[0][name], "recovered": last[1][name]} for name in names
    ]
    return result


SECTIONS: dict[str, Callable[[Bench], Result]] = {
    **{name: _section(name) for name in MAKE},
    "evaluation": evaluation,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen sections; returns the exit code."""
    about = (__doc__ or "").partition("\n")[0]
    title = "Other trainers, measured"
    return Check("gpu_checks.trainers", title, about, SECTIONS).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
