"""The shapes and runs whose peaks `gpu_checks.truth` measures."""

from __future__ import annotations

from typing import Any

from gpu_checks.workload import LLAMA_1B, LLAMA_8B
from oomguard.plan import Plan
from oomguard.prediction.settings import Settings

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_LORA: dict[str, Any] = {"lora_r": 16, "target_modules": _QKVO}
_NF4 = {"quantization": "nf4"}
_EAGER = {"attn_implementation": "eager"}  # Gemma 2 has nothing else
_ALL: dict[str, Any] = {"lora_r": 16, "target_modules": ("all-linear",)}
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": None},
    "llama32-1b": {"model_type": "llama", **LLAMA_1B},
    "llama3-8b": {"model_type": "llama", **LLAMA_8B},
    "mistral-7b": {
        **LLAMA_8B,
        "model_type": "mistral",
        "vocab_size": 32000,
        "sliding_window": None,
    },
    "gpt2": {"model_type": "gpt2", "n_positions": 2048, "use_cache": False},
    "gemma2": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 13,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
# Plan and settings of each run; what is not said is the default of `Plan` and `Settings`.
RUNS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {**_LORA, "max_length": 1024, "batch": 2},
        {**_LORA, "max_length": 1024, "batch": 2, "gradient_checkpointing": False},
        {**_LORA, "use_dora": True, "quantization": "nf4", "max_length": 1024},
        {**_LORA, "use_dora": True, "max_length": 1024, "gradient_checkpointing": False},
        {**_ALL, "lora_dropout": 0.1, "max_length": 1024, "gradient_checkpointing": False},
        {**_ALL, "quantization": "int8", "max_length": 1024},
        {**_ALL, "quantization": "int8", "max_length": 1024, "gradient_checkpointing": False},
        {**_ALL, "quantization": "fp4", "double_quant": False, "max_length": 1024},
        {**_ALL, "quantization": "nf4", "max_length": 1000, "batch": 3},
        {**_LORA, "attn_implementation": "eager", "max_length": 1024},
        {
            **_LORA,
            "attn_implementation": "eager",
            "max_length": 512,
            "gradient_checkpointing": False,
        },
        {**_LORA, "trainer": "trainer", "max_length": 1024, "batch": 2},
        {**_LORA, "trainer": "trainer", "mixed_precision": "bf16", "max_length": 1024},
        {**_LORA, "accumulation": 2, "max_length": 1024, "gradient_checkpointing": False},
        {**_LORA, "packing": True, "max_length": 1024, "batch": 2},
        {**_LORA, "padded": True, "max_length": 1024, "batch": 4},
        {**_LORA, "padded": True, "max_length": 1000, "batch": 4, "gradient_checkpointing": False},
        {**_LORA, "offload_activations": True, "max_length": 4096},
        {**_LORA, "checkpoint_every_n_layers": 2, "max_length": 2048},
        {**_LORA, "quantization": "nf4", "prepare_for_kbit": True, "max_length": 1024},
        {**_LORA, "dtype": "float16", "max_length": 1024, "gradient_checkpointing": False},
        {**_LORA, "dtype": "float32", "max_length": 1024, "gradient_checkpointing": False},
        {**_LORA, "dtype": "float32", "mixed_precision": "no", "max_length": 1024},
        {**_LORA, "quantization": "nf4", "max_length": 1024, "optim": "paged_adamw_32bit"},
    ],
    "llama32-1b": [
        {"optim": name, "max_length": 512} for name in ("adamw_torch", "adamw_torch_fused")
    ]
    + [
        {**kind, "batch": 4, "max_length": 2048, "gradient_checkpointing": on}
        for kind in (_LORA, {})
        for on in (True, False)
    ],
    "llama3-8b": [
        {**_LORA, **_NF4, "max_length": length, "gradient_checkpointing": on}
        for on, lengths in ((True, (1024, 2048, 8192)), (False, (1024, 2048)))
        for length in lengths
    ]
    + [{**_ALL, **_NF4, "lora_r": rank, "max_length": 1024} for rank in (8, 32)]
    + [
        {**_LORA, **_NF4, "batch": 4, "max_length": 2048, "gradient_checkpointing": on}
        for on in (True, False)
    ],
    "mistral-7b": [
        {**_LORA, **_NF4, "max_length": 1024},
        {"max_length": 1024},
        {"max_length": 1024, "optim": "adamw_8bit"},
        {"max_length": 1024, "optim": "adamw_8bit", "gradient_checkpointing": False},
        {"max_length": 1024, "dtype": "float32"},
    ],
    "mistral": [
        {"optim": name, "max_length": 512}
        for name in ("adafactor", "sgd", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused")
    ]
    + [
        {"accumulation": 2, "max_length": 512},
        {"dtype": "float32", "max_length": 1024, "gradient_checkpointing": False},
        {"trainer": "trainer", "max_length": 1024, "gradient_checkpointing": False},
        {"optim": "adamw_8bit", "max_length": 512},
    ],
    "gpt2": [
        {"max_length": 1024, "batch": 4},
        {"max_length": 1024, "batch": 4, "gradient_checkpointing": False},
        {"max_length": 512, "dtype": "float32", "gradient_checkpointing": False},
        {**_LORA, "target_modules": ("c_attn",), "max_length": 1024, "quantization": "nf4"},
    ],
    "gemma2": [
        {**_LORA, **_EAGER, "max_length": 1024},
        {**_LORA, **_EAGER, "max_length": 2048, "gradient_checkpointing": False},
        {**_LORA, **_EAGER, "max_length": 1024, "quantization": "nf4", "padded": True, "batch": 2},
    ],
    "gemma3": [
        {**_LORA, "max_length": 1024, "batch": 2},
        {**_LORA, "max_length": 1024, "gradient_checkpointing": False},
    ],
    "qwen3-0.6b": [
        {**_ALL, "max_length": 1024, "batch": 2},
        {**_ALL, "max_length": 1024, "batch": 2, "gradient_checkpointing": False},
        {"max_length": 1024},
        {**_ALL, "quantization": "nf4", "max_length": 128, "batch": 2},
    ],
    "mixtral": [
        {**_LORA, "max_length": 1024},
        {**_LORA, "max_length": 1024, "gradient_checkpointing": False},
        {**_LORA, "max_length": 1024, "quantization": "nf4"},
    ],
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
}


def batch_lengths(rows: int, length: int, *, padded: bool) -> list[int]:
    """Tokens of the rows of a batch; where padded, all but the first are half as long."""
    return [length // 2 if padded and row else length for row in range(rows)]


def request(run: dict[str, Any]) -> tuple[Plan, Settings]:
    """The plan and the settings of a run of `RUNS`."""
    values: dict[str, Any] = {"gradient_checkpointing": True, "optim": "adamw_torch_fused", **run}
    values["per_device_train_batch_size"] = values.pop("batch", 1)
    values["gradient_accumulation_steps"] = values.pop("accumulation", 1)
    if values.get("padded"):
        rows, length = values["per_device_train_batch_size"], values["max_length"]
        trained = sum(one - 1 for one in batch_lengths(rows, length, padded=True))
        values["target_share"] = trained / (rows * (length - 1))
    kept = {name: value for name, value in values.items() if name in Settings.names()}
    plan = Plan(**{name: value for name, value in values.items() if name not in kept})
    return plan, Settings(**kept)
