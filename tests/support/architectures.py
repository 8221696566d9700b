"""Tiny configurations of many architectures: two or three blocks, without dropout; nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from llmtune.model.base import Base
from tests.support import tiny

_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
_LINEAR |= {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
_ROUTED |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_CALM = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

KINDS: dict[str, dict[str, Any]] = {
    "llama": _HEADS,
    "qwen2": _GROUPED,
    "qwen3": _HEADS,
    "mistral": _HEADS,
    "phi3": _GROUPED,
    "gemma2": _HEADS,
    "gemma3_text": {**_HEADS, **_SLIDING},
    "gemma4_text": {
        **_HEADS,
        **_SLIDING,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 259,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
    },
    "gpt2": _CALM,
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.0},
    "bloom": {},
    "falcon": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "starcoder2": _GROUPED,
    "olmo2": {},
    "granite": {**_GROUPED, "logits_scaling": 3.0, "residual_multiplier": 0.5},
    "cohere2": _GROUPED,
    "mixtral": _HEADS,
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "gpt_oss": {**_HEADS, **_SLIDING, **_LOCAL},
    "llama4_text": {**_HEADS, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "phimoe": {**_GROUPED, "num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "deepseek_v3": {**_LATENT, **_ROUTED},
    "qwen3_5_text": {**_HEADS, **_LINEAR},
    "qwen3_next": {**_HEADS, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "bamba": {**_GROUPED, **_MAMBA, "attn_layer_indices": [1], "mamba_expand": 2},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 16},
    "falcon_h1": {**_HEADS, **_MAMBA, "mamba_d_ssm": 64, "mamba_expand": 2},
    "nemotron_h": {
        **_HEADS,
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "expand": 2,
    },
    "zamba2": {
        "layers_block_type": ["hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 3,
        "num_mem_blocks": 1,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_expand": 2,
        "chunk_size": 16,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "jamba": {
        **_GROUPED,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "recurrent_gemma": {**_GROUPED, "block_types": ["recurrent", "attention"], "lru_width": 32},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "chunk_size": 16},
    "doge": _GROUPED,
}
"""Causal language models by model type, and what their configuration needs to be tiny."""

RECENT: dict[str, dict[str, Any]] = {
    "smollm3": _GROUPED,
    "olmo3": {**_GROUPED, **_SLIDING},
    "ernie4_5": _HEADS,
    "exaone4": _HEADS,
    "seed_oss": {**_HEADS, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "glm4": _HEADS,
    "phi": {**_GROUPED, **_CALM},
    "qwen3_5_moe_text": {**_HEADS, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "glm4_moe": {**_HEADS, **_ROUTED},
    "deepseek_v2": {**_LATENT, **_ROUTED},
    "deepseek_v32": {**_LATENT, **_ROUTED, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
    "ernie4_5_moe": {
        **_GROUPED,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "minimax": {**_HEADS, **_LOCAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m2": {**_HEADS, **_LOCAL},
    "hunyuan_v1_moe": {**_HEADS, "num_experts": 4, "moe_topk": 2},
    "granitemoehybrid": {
        **_GROUPED,
        **_MAMBA,
        **_LOCAL,
        "mamba_expand": 2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
    },
    "olmo_hybrid": {**_GROUPED, **_LINEAR},
    "lfm2_moe": {**_GROUPED, **_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}
"""More of them, of this year and the last."""

_LISTS = ("layer_types", "layers_block_type", "block_types")
"""The keys of configurations that name each block's kind."""

TEXT = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_HEADS}
TEXT |= {"intermediate_size": 64, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
TEXT |= {"pad_token_id": 0}


def settings(kind: str, blocks: int = 2) -> dict[str, Any]:
    """What the configuration of a type needs to be tiny with so many blocks, or those that its settings name."""
    own = (KINDS | RECENT)[kind]
    blocks = own.get("num_hidden_layers", blocks)
    lists = {key: [value[index % len(value)] for index in range(blocks)] for key, value in own.items() if key in _LISTS}
    return {"blocks": blocks, **{key: value for key, value in own.items() if key != "num_hidden_layers"}, **lists}


def model(kind: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A randomly initialised fp32 model of a causal language model's type."""
    built: PreTrainedModel = tiny.model(kind, seed, **settings(kind) | more)
    return built


def wide_model(kind: str) -> PreTrainedModel:
    """A model for evaluation with large weights, without which it gives every row one answer."""
    built = model(kind).eval()
    for parameter in built.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    return built


def config_folder(folder: Path, config: PreTrainedConfig, stored: str | None = None) -> Base:
    """A base that has a configuration alone, whose file says it holds a model of the class `stored`."""
    config.architectures = [stored] if stored else None
    config.save_pretrained(folder)
    return Base(folder, "tiny", None, None)


def vision_config(**more: Any) -> PreTrainedConfig:
    """The configuration of a Gemma 3 whose vision tower has as many layers as its text model."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 5, "boi_token_index": 7, "eoi_token_index": 8}
    return AutoConfig.for_model("gemma3", text_config=TEXT, vision_config=vision, **tokens, **more)


def save_vision_base(folder: Path) -> Path:
    """Write a vision-language base (Gemma 3) with its processor's files."""
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_config(vision_config(), dtype=torch.float32)
    base.generation_config.eos_token_id = 2
    base.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    (folder / "processor_config.json").write_text('{"processor_class": "Gemma3Processor"}')
    (folder / "video_preprocessor_config.json").write_text("{}")
    return folder
