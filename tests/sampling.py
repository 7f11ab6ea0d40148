"""TRL's trainers that sample what they train on, in steps of 2 x 4 completions."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests import tiny
from tests.twin import SMALL

if TYPE_CHECKING:
    from pathlib import Path

VALUES: dict[str, Any] = {
    **SMALL,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_generations": 4,
    "max_completion_length": 12,
}
# B is not 0: what is sampled differs from the reference from the first step on.
LEARNED = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj", "up_proj"],
    lora_dropout=0.0,
    init_lora_weights=False,
    task_type="CAUSAL_LM",
)


@cache
def prompts() -> Dataset:
    """The first words of texts, of different lengths."""
    return Dataset.from_dict({"prompt": [t[: 20 + i % 7] for i, t in enumerate(tiny.texts()[:16])]})


def reward_calls(trainer: Any) -> int:
    """How often the reward function of a trainer was asked."""
    return int(trainer.reward_funcs[0].calls)


class Variety:
    """A reward for many different characters that counts how often it was asked."""

    __name__ = "variety"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
        """The score of each completion."""
        self.calls += 1
        return [len(set(text)) / 10 + 0.01 * len(text) for text in completions]


def model() -> Any:
    """A Llama for which every tenth token is the end, so that completions differ in length."""
    llama = tiny.llama()
    llama.generation_config.eos_token_id = [1, *range(40, 90)]
    return llama


def grpo(
    folder: Path,
    *,
    trainer_class: type[GRPOTrainer] = GRPOTrainer,
    lora: LoraConfig | None = LEARNED,
    **changes: Any,
) -> GRPOTrainer:
    """A GRPOTrainer; `changes` go to its config."""
    return trainer_class(
        model=model(),
        reward_funcs=Variety(),
        args=GRPOConfig(**{**VALUES, "output_dir": str(folder), **changes}),
        train_dataset=prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(lora),
    )


def rloo(folder: Path, **changes: Any) -> RLOOTrainer:
    """An RLOOTrainer; `changes` go to its config."""
    return RLOOTrainer(
        model=model(),
        reward_funcs=Variety(),
        args=RLOOConfig(**{**VALUES, "output_dir": str(folder), **changes}),
        train_dataset=prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(LEARNED),
    )
