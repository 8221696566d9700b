"""Reads some of a base's stored tensors as parameters of its model, without the others."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llmtune.model.check import UnreadTensor
from llmtune.model.files.report import refuse_differences
from llmtune.model.files.stored import StoredTensor
from llmtune.model.reading import reading


def parameter_names(skeleton: PreTrainedModel, keys: Collection[str]) -> dict[str, str]:
    """Stored tensor -> the parameter that it becomes, or becomes a part of, as transformers loads it."""
    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    converted = {key: rename_source_key(key, renamings, converters, prefix, own)[0] for key in keys}
    direct = {key: rename_source_key(key, [], [], prefix, own)[0] for key in keys}
    return {key: direct[key] if name not in own and key in own else name for key, name in converted.items()}


def converted_keys(skeleton: PreTrainedModel, keys: Collection[str]) -> set[str]:
    """The stored tensors that transformers changes as it loads them, not only their names."""
    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    return {key for key in keys if rename_source_key(key, renamings, converters, prefix, own)[1] is not None}


def load_partly(
    name: str,
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    stored: Mapping[str, StoredTensor],
    keys: Collection[str],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The model of a base in evaluation mode with the stored tensors `keys`, the others on the meta device.

    `name` is the base's. Raises FieldError where the files are not exactly the tensors of the model.
    """
    lazy: dict[str, Any] = {key: UnreadTensor(tensor.shape) for key, tensor in stored.items() if key not in keys}
    with ExitStack() as files:
        for file in sorted({stored[key].file for key in keys}):
            tensors = files.enter_context(safe_open(file, framework="pt"))
            lazy |= {key: tensors.get_slice(key) for key in keys if stored[key].file == file}
        with reading(name, "its weights"):
            model, report = kind.from_pretrained(
                None, config=config, state_dict=lazy, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    refuse_differences(name, report)
    loaded: PreTrainedModel = model.eval()
    return loaded
