"""Tells which kind of model a base is, by its configuration, and refuses those that cannot be trained whole."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)

from llmtune.errors import FieldError
from llmtune.model.blocks import blocks

WRAPPERS = (
    "exaone4_5",
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "minicpmv4_6",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
)
"""Types of vision-language models whose text model trains inside them; a test proves each, from training to merging."""

_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the classes of causal language models end, of transformers and of models with code of their own."""
_ADVICE = "name a base that is a causal language model of text"
_UNPROVED = "that merging keeps its other parts is not proved for this type"
_UNSCALED = "transformers computes its logits without their scale, which its text model has"
_REASONS = {
    "aya_vision": _UNSCALED,
    "cohere2_vision": _UNSCALED,
    "mllama": "text does not pass its cross-attention layers",
    "paligemma": "the tokens of its prompts see those after them",
    "diffusion_gemma": "it writes by diffusion",
}
"""Why text alone cannot train vision-language models of other types, where more is known than that it is not proved."""


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The class that loads a base whole: of a vision-language model with all its parts."""
    return AutoModelForImageTextToText if _is_wrapper(config) else AutoModelForCausalLM


def check_kind(config: PreTrainedConfig, name: str) -> None:
    """Raise FieldError where transformers has no causal language model for a base, or one for a part of it alone.

    `name` is the recipe's name of the base.
    """
    stored = (config.architectures or [config.model_type])[0]
    if config.is_encoder_decoder:
        raise FieldError("model.base", f"{name} is an encoder-decoder model ({stored}); {_ADVICE}")
    if _is_wrapper(config):
        _check_wrapper(config, name, stored)
    else:
        _check_text_model(config, name, stored)


def _check_text_model(config: PreTrainedConfig, name: str, stored: str) -> None:
    """Raise FieldError for a configuration or a class of which no causal language model is made whole."""
    causal = _class_of(MODEL_FOR_CAUSAL_LM_MAPPING, config, stored)
    if causal is None:
        raise FieldError("model.base", f"{name} is a {stored}, no causal language model; {_ADVICE}")
    if getattr(causal, "config_class", None) in config.sub_configs.values():
        lost = " and ".join(sorted(key for key, part in _parts(config).items() if part is not config.get_text_config()))
        message = f"{name} is a {stored}, of which transformers trains the text model alone ({causal.__name__})"
        raise FieldError("model.base", f"{message}: merged weights would lack {lost}; {_ADVICE}")
    if config.architectures and stored != causal.__name__ and not stored.endswith(_CAUSAL):
        raise FieldError("model.base", f"{name} stores a {stored}, no causal language model; {_ADVICE}")


def check_causal(model: nn.Module, name: str) -> None:
    """Raise FieldError for a model whose tokens attend to those after them."""
    if any(getattr(module, "is_causal", None) is False for module in blocks(model).modules()):
        message = f"{name} is a {type(model).__name__} whose tokens see those after them; {_ADVICE}"
        raise FieldError("model.base", message)


def _is_wrapper(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a vision-language model, with a text model in it."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and config.get_text_config() is not config


def _check_wrapper(config: PreTrainedConfig, name: str, stored: str) -> None:
    """Raise FieldError for a vision-language model of a type that is not proved, or stored as another class."""
    kind = config.model_type
    if kind not in WRAPPERS:
        message = f"{name} is a {stored}, a vision-language model that llmtune does not train"
        raise FieldError("model.base", f"{message}: {_REASONS.get(kind, _UNPROVED)}; {_ADVICE}")
    whole = _class_of(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config, stored)
    if config.architectures and whole is not None and stored != whole.__name__:
        message = f"{name} stores a {stored}, but its configuration ({kind}) is that of a {whole.__name__}"
        raise FieldError("model.base", f"{message}; save it with the configuration of its own class, or {_ADVICE}")


def _class_of(mapping: Mapping[type, Any], config: PreTrainedConfig, stored: str) -> type | None:
    """The class that an auto class takes by its mapping, None where there is none."""
    classes = mapping.get(type(config), None)
    if not isinstance(classes, tuple):
        return classes
    return next((one for one in classes if one.__name__ == stored), classes[0])


def _parts(config: PreTrainedConfig) -> dict[str, object]:
    """The configurations of a model's parts, by key."""
    return {key: getattr(config, key, None) for key in config.sub_configs}
