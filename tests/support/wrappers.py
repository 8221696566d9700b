"""Tiny random vision-language models of the types that train on text; nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from tests.support import architectures, tiny
from tests.support.architectures import KINDS

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROTATED: dict[str, Any] = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
_GLM: dict[str, Any] = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}
_HALF = {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5, "mrope_interleaved": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN35 = {**KINDS["qwen3_5_text"], "rope_parameters": _HALF}

_TEXT: dict[str, dict[str, Any]] = {
    "qwen2_vl_text": _ROTATED,
    "qwen2_5_vl_text": _ROTATED,
    "qwen3_vl_text": _ROTATED,
    "qwen3_vl_moe_text": {**_ROTATED, **_EXPERTS},
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": {**_QWEN35, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "glm4v_text": _GLM,
    "glm4v_moe_text": {
        **_GLM,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
}
"""What text models need beside the sizes that all take, by their type."""

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
_SIZES |= {"image_size": 28, "patch_size": 14}
_DEEP = {"depth": 2, "num_heads": 4, "out_hidden_size": 32}
_TABLE = {**_DEEP, "num_position_embeddings": 16}
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl_vision": {"depth": 1, "num_heads": 4, "embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl_vision": {**_DEEP, "fullatt_block_indexes": [0]},
    "qwen3_vl_vision": {**_TABLE, "deepstack_visual_indexes": [0]},
    "qwen3_vl_moe_vision": {**_TABLE, "deepstack_visual_indexes": [0]},
    "qwen3_5_vision": _TABLE,
    "qwen3_5_moe_vision": _TABLE,
    "glm4v_vision": _DEEP,
    "glm4v_moe_vision": _DEEP,
    "llama4_vision_model": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    "gemma4_vision": {"num_key_value_heads": 4},
    "gemma4_unified_vision": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
}
"""What vision towers need beside the sizes that all take, by their type."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config(kind: str) -> PreTrainedConfig:
    """A small configuration of a vision-language model's type, whose image tokens are in the tiny vocabulary."""
    default = AutoConfig.for_model(kind).to_dict()
    text = default["text_config"]["model_type"]
    vision = (default.get("vision_config") or {}).get("model_type") or f"{kind}_vision"
    named = [key for key, value in default.items() if key.endswith(("token_id", "token_index")) and key not in _IDS]
    tokens = {key: 5 + index for index, key in enumerate(named) if isinstance(default[key], int)}
    return AutoConfig.for_model(
        kind,
        text_config={"model_type": text, **architectures.TEXT, **KINDS.get(text, {}), **_TEXT.get(text, {})},
        vision_config={"model_type": vision, **_SIZES, **_VISION.get(vision, {})},
        **tokens,
    )


def model(kind: str) -> PreTrainedModel:
    """A randomly initialised fp32 vision-language model, in evaluation mode."""
    torch.manual_seed(0)
    built: PreTrainedModel = AutoModelForImageTextToText.from_config(config(kind), dtype=torch.float32)
    built.generation_config.eos_token_id = 2
    return built.eval()


def save_base(folder: Path, kind: str) -> Path:
    """Write a vision-language base's folder like one from the Hub, with its processor's files."""
    model(kind).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    (folder / "processor_config.json").write_text('{"image_seq_length": 4}')
    (folder / "video_preprocessor_config.json").write_text("{}")
    return folder
