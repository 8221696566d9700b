"""A base model on this machine: its configuration, and the model itself, with its weights or without."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from llmtune.machine.device import run_device
from llmtune.model.dequantize import load_dequantized
from llmtune.model.files.converted import Converted
from llmtune.model.files.quantization import dequantized_format
from llmtune.model.files.report import refuse_differences
from llmtune.model.files.stored import refuse_damaged
from llmtune.model.kinds import auto_class, check_causal, check_kind
from llmtune.model.reading import bounded, reading
from llmtune.plan.stages import Facts

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST_LAYERS = 10_000
_SIZES = ("num_hidden_layers", "hidden_size", "vocab_size")


@dataclass(frozen=True)
class Base:
    """A base model on this machine."""

    folder: Path
    name: str
    """The recipe's name for it."""
    revision: str | None
    """A commit on the Hub or the SHA-256 of a .gguf file; None for a folder."""
    hub_id: str | None
    """The model on the Hub that a card names."""
    converted: Converted | None = None
    """The .gguf file that the weights in the folder were converted from, where they were."""
    start: str | None = None
    """The adapter that was named as the base, and of which this is the base: a folder, or a Hub id at a commit."""
    added: tuple[int, ...] = ()
    """The ids of tokens that the model did not have: the folder is a copy with longer embeddings."""


class NamedBase(Protocol):
    """The name of a base, as in a recipe's `model` section."""

    @property
    def base(self) -> str:
        """A Hub id, a folder, a .gguf file, or package:NAME."""

    @property
    def revision(self) -> str | None:
        """Commit, tag or branch of a Hub id."""

    @property
    def add_tokens(self) -> tuple[str, ...]:
        """Tokens that the model gets."""


def load_config(base: Base) -> PreTrainedConfig:
    """The model's configuration; raises FieldError where it is damaged, of unknown type, or needs its own code."""
    file = base.folder / "config.json"
    refuse_damaged(file, base.name)
    with reading(base.name, file.name):
        _refuse_contents(json.loads(file.read_text(encoding="utf-8")))
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            base.folder, trust_remote_code=False, local_files_only=True
        )
        _refuse_sizes(config)
    return config


def _refuse_contents(config: object) -> None:
    """Raise ValueError for weights under another name, and for so many layers that their names fill the memory."""
    if not isinstance(config, dict):
        raise ValueError("it holds no configuration of a model")
    if "transformers_weights" in config:
        raise ValueError("it names its weights by transformers_weights; call them model.safetensors")
    for key in _LAYERS:
        count = config.get(key)
        if isinstance(count, int | float) and count > _MOST_LAYERS:
            raise ValueError(f"{key} is {count:.3g}, more than any model has")


def _refuse_sizes(config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    sizes = {key: getattr(text, key, None) for key in _SIZES}
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None:
        sizes["max_position_embeddings"] = positions
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}, and should be a whole number above 0")


def vocabulary(config: PreTrainedConfig) -> int:
    """The rows of the model's embeddings."""
    return int(config.get_text_config().vocab_size)


def load_model(
    base: Base,
    dtype: torch.dtype = torch.float32,
    keep: list[str] | None = None,
    device: torch.device | None = None,
    bits: int = 4,
) -> PreTrainedModel:
    """The base model in evaluation mode; with `keep`, linear layers but these are quantized: to NF4, or to 8 bits.

    Each weight goes straight to `device`. Without one, it goes to the CPU, or where bitsandbytes would have it.
    Raises FieldError where the files are not exactly the tensors of the model.
    """
    options: dict[str, Any] = {}
    if device is not None and (device.type != "cpu" or keep is not None):
        options["device_map"] = {"": str(device)}
    if keep is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=keep,
        )
    config = load_config(base)
    with reading(base.name, "its weights"):
        model, loaded = _read(base, config, dtype, options)
    refuse_differences(base.name, loaded)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack weights at the first evaluation, and later gradients would be silently wrong.
            module.support_avx512bf16_for_cpu = False
    checked: PreTrainedModel = model.eval()
    return checked


def _read(
    base: Base, config: PreTrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' report on its tensors."""
    if dequantized_format(config):
        return load_dequantized(base.folder, config, dtype, options)
    model, report = auto_class(config).from_pretrained(
        base.folder,
        config=config,
        dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    return model, report


def build_skeleton(base: Base) -> PreTrainedModel:
    """The model without its weights (meta device); raises FieldError where it is no causal language model."""
    config = load_config(base)
    with reading(base.name, "the model of its config.json"):
        check_kind(config, base.name)
        run_device()  # a driver that starts within the bound of memory fails, and the GPU is not found
        with bounded(120, 8 << 30), torch.device("meta"):
            skeleton: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False)
        check_causal(skeleton, base.name)
    return skeleton


def model_facts(model: PreTrainedModel) -> Facts:
    """Blocks, hidden size and parameters of a model."""
    config = model.config.get_text_config()
    return Facts(
        config.num_hidden_layers, config.hidden_size, sum(parameter.numel() for parameter in model.parameters())
    )
