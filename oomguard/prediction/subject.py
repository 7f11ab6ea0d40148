"""What is estimated: a model's configuration, whatever form it was given in."""

from __future__ import annotations

import copy
import json
import os
import textwrap
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from oomguard.errors import ConfigurationError

_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OF_A_PATH = (".", "/", "~")  # with which no id of a model begins
_REASON_CHARACTERS = 240


def config_of(model: Any) -> PretrainedConfig:
    """A copy of the configuration of `model`.

    Args:
        model: A `PretrainedConfig`, the path of a folder or of a `config.json`, or the id of a
            model, of which the configuration alone is fetched.

    Raises:
        ConfigurationError: There is no such model, or it has no language-model head.
    """
    if isinstance(model, PretrainedConfig):
        config = copy.deepcopy(model)
    elif isinstance(model, (str, os.PathLike)):
        config = _load(os.fspath(model))
    else:
        msg = (
            f"model is a {type(model).__name__}: give a trainer, a PretrainedConfig, a folder, a "
            "config.json or the id of a model"
        )
        raise ConfigurationError(msg)
    name = getattr(config, "name_or_path", "") or type(config).__name__
    heads = config.architectures or []
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        heads and not any(head.endswith(_HEADS) for head in heads)
    ):
        said = ", ".join(heads) or config.model_type
        msg = f"{name} ({said}) has no language-model head: give a causal language model"
        raise ConfigurationError(msg)
    return config


def _load(model: str) -> PretrainedConfig:
    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        msg = f"{model} has no config.json: give the folder of a saved model"
        raise ConfigurationError(msg)
    if path.is_file():
        _check_json(path)
    elif not path.exists() and (path.suffix == ".json" or model.startswith(_OF_A_PATH)):
        msg = f"there is no {model}: give a folder, a config.json or the id of a model"
        raise ConfigurationError(msg)
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # noqa: BLE001 - hub, file and class errors have no common base
        reason = textwrap.shorten(str(error), _REASON_CHARACTERS, placeholder=" ...")
        msg = (
            f"no configuration of a model can be read from {model!r}: give a folder, a config.json "
            f"or the id of a model ({reason})"
        )
        raise ConfigurationError(msg) from None
    if not isinstance(config, PretrainedConfig):
        msg = f"{model} holds a {type(config).__name__}, not the configuration of a model"
        raise ConfigurationError(msg)
    return config


def _check_json(path: Path) -> None:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        msg = f"{path} is not JSON: give a folder, a config.json or the id of a model ({error})"
        raise ConfigurationError(msg) from None
    if not isinstance(values, dict) or "model_type" not in values:
        msg = f"{path} names no model_type: it is not the config.json of a transformers model"
        raise ConfigurationError(msg)


def text_config(config: PretrainedConfig) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config()


def depth_of(config: PretrainedConfig) -> int:
    """Layers of the language model."""
    return int(text_config(config).num_hidden_layers)
