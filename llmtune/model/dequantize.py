"""Loads a base that is stored in fp8 or MXFP4 as the 16-bit model that transformers makes of it."""

from pathlib import Path
from typing import Any

import torch
from transformers import FineGrainedFP8Config, Mxfp4Config, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmtune.model.files.quantization import stored_quantization, without_quantization
from llmtune.model.kinds import auto_class

_CONFIGS = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


def load_dequantized(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a folder whose weights are stored in fp8 or MXFP4, and transformers' report on its tensors.

    They are bf16 first, whatever `dtype` they are put into, so that there is one base in every precision.
    """
    method = (stored_quantization(config) or {})["quant_method"]
    stored, report = auto_class(config).from_pretrained(
        folder,
        config=config,
        dtype=torch.bfloat16,
        quantization_config=_CONFIGS[method](dequantize=True),
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    # What is loaded so casts none of the other tensors, and would be saved under the names of packed ones. Loaded
    # again, under the names that the architecture's files have, it is as if the files held 16 bits.
    plain = without_quantization(config)
    with torch.device("meta"):
        skeleton = type(stored)(plain)
    tensors = revert_weight_conversion(skeleton, stored.state_dict())
    del stored
    model = type(skeleton).from_pretrained(
        None, config=plain, state_dict=tensors, dtype=dtype, local_files_only=True, **options
    )
    return model, report
