"""The base's tokenizer, made safe to train with, and the limits of the model that its tokens must keep."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateSyntaxError
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.errors import FieldError
from llmtune.model.base import Base, load_config, vocabulary
from llmtune.model.files.fingerprints import TOKENIZER, named_like
from llmtune.model.files.stored import refuse_damaged
from llmtune.model.reading import bounded, error_words, reading

RENDER_SECONDS, RENDER_BYTES = 5, 1 << 30
"""What rendering one conversation may take."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Limits:
    """What a row must keep to be read by the model."""

    vocabulary: int
    """The rows of the embeddings: every token id is below it."""
    positions: int | None
    """The most tokens that a row may have, where the model learned its positions."""


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with its chat template, and with a pad token that the model has.

    Raises FieldError where it is damaged or has no usable template.
    """
    for file in named_like(base.folder, TOKENIZER):
        refuse_damaged(file, base.name)
    if not any(file.is_file() for pattern in _VOCABULARIES for file in base.folder.glob(pattern)):
        message = f"{base.name} has no tokenizer (no tokenizer.json); copy the tokenizer's files of its model there"
        raise FieldError("model.base", message)
    config = load_config(base)
    with reading(base.name, "its tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            base.folder, trust_remote_code=False, local_files_only=True
        )
        if not len(tokenizer) or not isinstance(tokenizer.encode("a"), list):
            raise ValueError("it has no tokens")
        _refuse_contents(tokenizer)
    _choose_template(base, tokenizer)
    _choose_pad(base, tokenizer, config)
    return tokenizer


def _refuse_contents(tokenizer: PreTrainedTokenizerBase) -> None:
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise ValueError(f"model_max_length is {limit!r}, and should be a number")


def _choose_template(base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise FieldError for named templates of which none is the default, and for one that cannot be rendered."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            named = f"{len(template)} chat templates ({', '.join(sorted(map(str, template)))})"
            message = f"{base.name} has {named}, and none is named default; keep one as chat_template.jinja"
            raise FieldError("model.base", message)
        tokenizer.chat_template = template = template["default"]
    if template:
        _try_template(base, tokenizer)


def _try_template(base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise FieldError for a template that is no template, or that takes too much; a row shows what else is wrong."""
    with reading(base.name, "its chat template"):
        try:
            with bounded(RENDER_SECONDS, RENDER_BYTES):
                tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(f"{error_words(error)} (line {error.lineno})") from error
        except MemoryError as error:
            raise ValueError(f"it takes over {RENDER_BYTES >> 30} GB of memory") from error
        except Exception:
            return


def _choose_pad(base: Base, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Pad with a token that the model has: padding is masked, so any does; the best are its own and eos."""
    size = vocabulary(config)
    if tokenizer.pad_token_id is not None and 0 <= tokenizer.pad_token_id < size:
        return
    ids = [tokenizer.eos_token_id, _named(config, "pad_token_id"), *_named_stops(base, config), 0]
    for token in (tokenizer.convert_ids_to_tokens(i) for i in ids if isinstance(i, int) and 0 <= i < size):
        if isinstance(token, str):
            tokenizer.pad_token = token
            return
    raise FieldError("model.base", f"{base.name} has no token to pad with: its tokenizer is another model's")


def stop_ids(base: Base) -> set[int]:
    """The token ids that end generation, from the base's generation config, else its config.

    Raises FieldError where there is none that the model has.
    """
    config = load_config(base)
    named, size = _named_stops(base, config), vocabulary(config)
    if not named:
        raise FieldError("model.base", f"{base.name} names no token that ends generation (eos_token_id)")
    stops = {token for token in named if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < size}
    if not stops:
        message = f"{base.name} ends generation at token {named[0]!r} (eos_token_id), but has {size} tokens"
        raise FieldError("model.base", message)
    return stops


def _named_stops(base: Base, config: PreTrainedConfig) -> list[object]:
    file = base.folder / "generation_config.json"
    ids = _named(config, "eos_token_id")
    if file.exists():
        with reading(base.name, file.name):
            ids = GenerationConfig.from_pretrained(base.folder).eos_token_id
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _named(config: PreTrainedConfig, key: str) -> object:
    # A configuration of several models may name a token itself, or only in its language model.
    own = getattr(config, key, None)
    return getattr(config.get_text_config(), key, None) if own is None else own


def model_limits(skeleton: PreTrainedModel) -> Limits:
    """The limits of a model, without its weights."""
    text = skeleton.config.get_text_config()
    made_for = getattr(text, "max_position_embeddings", None)
    words = skeleton.get_input_embeddings()
    # Learned positions are an embedding as long as the configuration says, or a little longer (OPT keeps two more).
    others = [module for module in skeleton.modules() if isinstance(module, nn.Embedding) and module is not words]
    learned = made_for and any(made_for <= module.num_embeddings <= made_for + 4 for module in others)
    return Limits(words.num_embeddings, made_for if learned else None)


def angles_limit(config: PreTrainedConfig) -> int | None:
    """The tokens of a pass's longest row beyond which all of its rows have other rotary angles; None where none has."""
    text = config.get_text_config()
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    # Some models have other angles in each kind of layer.
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    limits: list[int | None] = [
        kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"
    ]
    limits += [text.max_position_embeddings for kind in kinds if kind.get("rope_type") == "dynamic"]
    return min((limit for limit in limits if limit is not None), default=None)
