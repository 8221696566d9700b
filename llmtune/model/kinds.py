"""Tells which kind of model a base is, by its configuration, and refuses those that cannot be trained whole."""

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from llmtune.errors import FieldError
from llmtune.model.blocks import blocks

_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the classes of causal language models end, of transformers and of models with code of their own."""
_ADVICE = "name a base that is a causal language model of text"


def check_kind(config: PreTrainedConfig, name: str) -> None:
    """Raise FieldError where transformers has no causal language model for a base, or one for a part of it alone.

    `name` is the recipe's name of the base.
    """
    stored = (config.architectures or [config.model_type])[0]
    if config.is_encoder_decoder:
        raise FieldError("model.base", f"{name} is an encoder-decoder model ({stored}); {_ADVICE}")
    causal = _causal_class(config, stored)
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


def _causal_class(config: PreTrainedConfig, stored: str) -> type | None:
    """The class that AutoModelForCausalLM takes, None where there is none."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(classes, tuple):
        return classes
    return next((one for one in classes if one.__name__ == stored), classes[0])


def _parts(config: PreTrainedConfig) -> dict[str, object]:
    """The configurations of a model's parts, by key."""
    return {key: getattr(config, key, None) for key in config.sub_configs}
