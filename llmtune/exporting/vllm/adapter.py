"""What vLLM takes of a delta, by the files of the delta: its LoRA layers leave out, or refuse, much that PEFT has."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.adapters.delta import ADAPTER, BASE
from llmtune.adapters.kinds import KINDS
from llmtune.files import read_json

CONFIG = "adapter_config.json"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be, in vLLM 0.9 to 0.32."""
_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
_SHOWN = 3


@dataclass(frozen=True)
class Served:
    """An adapter that vLLM serves whole: its rank, its layers, and the least rank that vLLM is started with."""

    rank: int
    layers: tuple[str, ...]

    @property
    def max_rank(self) -> int:
        """The rank to start vLLM with."""
        return next(rank for rank in RANKS if rank >= self.rank)


def read_adapter(delta: Path) -> Served | str:
    """The adapter in a delta's folder, or in words what vLLM would not take of it."""
    if reasons := [*_not_lora(read_json(delta / BASE))]:
        return reasons[0]
    config = read_json(delta / CONFIG)
    shapes = _shapes(delta / ADAPTER)
    reasons = [*_settings(config), *_names(shapes)]
    if reasons:
        return "; ".join(reasons)
    ranks = {shape[0] if name.endswith("lora_A.weight") else shape[1] for name, shape in shapes.items()}
    if ranks != {config["r"]}:
        return f"layers of other ranks than the {config['r']} of {CONFIG}"
    if config["r"] > RANKS[-1]:
        return f"rank {config['r']}; vLLM's largest is {RANKS[-1]}"
    return Served(int(config["r"]), tuple(sorted({_NAME.fullmatch(name)["layer"] for name in shapes})))  # type: ignore[index]


def _not_lora(stored: dict[str, Any]) -> Iterator[str]:
    """Why a delta is no LoRA on a base that vLLM loads as it was trained on."""
    if stored["kind"] == "tensors":
        yield "trained tensors of the model itself; vLLM's adapters are LoRA alone"
    elif not (adapter := KINDS[stored["adapter"]]).served_beside_base:
        yield f"{adapter.name} adapters; vLLM's are LoRA alone"
    if stored.get("added"):
        yield "embeddings of new tokens, which vLLM leaves out"
    if stored.get("converted"):
        yield "a base that comes from a .gguf file, which vLLM reads in its own way"
    if stored.get("dequantized"):
        yield f"a base that is stored in {stored['dequantized']} and was trained dequantized"


def _settings(config: dict[str, Any]) -> Iterator[str]:
    """What of PEFT's settings vLLM refuses, or some of its versions leave out in silence."""
    if config.get("use_dora"):
        yield "DoRA's magnitudes"
    if config.get("modules_to_save"):
        yield f"whole copies of layers ({', '.join(config['modules_to_save'])})"
    if config.get("trainable_token_indices"):
        yield "trained embeddings of single tokens"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield "trained biases"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield "ranks or alphas of single layers, which versions of vLLM scale as all others"
    if config.get("target_parameters"):
        yield "experts that are one tensor"
    if isinstance(config.get("init_lora_weights"), str) and config["init_lora_weights"] not in (
        "gaussian",
        "orthogonal",
    ):
        yield f"a start of {config['init_lora_weights']}"


def _names(shapes: dict[str, list[int]]) -> Iterator[str]:
    """The tensors that vLLM has no layer for."""
    others = sorted(name for name in shapes if not _NAME.fullmatch(name))
    if others:
        yield f"tensors that are no LoRA of a linear layer ({_some(others)})"
    layers = {match["layer"] for match in map(_NAME.fullmatch, shapes) if match}
    ends = sorted(layer for layer in layers if layer.rpartition(".")[2] in ("lm_head", "embed_tokens", "wte"))
    if ends:
        yield f"LoRA of embeddings or head ({_some(ends)}), which few of vLLM's models take"
    experts = sorted(layer for layer in layers if ".experts." in layer)
    if experts:
        yield f"LoRA of experts ({_some(experts)}), which few of vLLM's models take"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        return {name: list(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
