"""The LoRA family in PEFT's terms: what is adapted at which rank, and starts that move weight from base to adapter."""

import json
import math
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.adapters.sections import Lora
from llmtune.errors import FieldError, TrainingError, nearest
from llmtune.model.mlp import features

INITIAL = "initial-adapter.safetensors"
_KEPT = "_initial_adapter"


def lora_config(model: nn.Module, spec: Lora, targets: list[str]) -> LoraConfig:
    """PEFT's configuration for these layers, by full name; raises RecipeError for what they cannot follow."""
    for key, patterns in (("ranks", spec.ranks), ("alphas", spec.alphas)):
        for pattern in patterns:
            if not any(get_pattern_key([pattern], name) == pattern for name in targets):
                hint = nearest(pattern, sorted({name.rsplit(".", 1)[-1] for name in targets}))
                raise FieldError(f"method.adapter.{key}", f"{pattern!r} matches none of the adapted layers{hint}")
    for name in targets if moves_weight(spec) else []:
        most = min(features(model.get_submodule(name)))
        rank = spec.ranks.get(get_pattern_key(list(spec.ranks), name), spec.rank)
        if rank > most:
            said = f"{spec.init} takes at most rank {most} from {name}, not {rank}"
            raise FieldError("method.adapter.rank", f"{said}; the nearest valid is {most}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        rank_pattern=dict(spec.ranks),
        alpha_pattern=dict(spec.alphas),
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        init_lora_weights=True if spec.init in ("default", *_STARTS) else spec.init,
    )


def chosen_distances(spec: Lora, blocks: int) -> set[int]:
    """The distances of the blocks that the recipe's `layers` means; raises RecipeError for one the model has not."""
    if isinstance(spec.layers, tuple):
        beyond = [distance for distance in spec.layers if distance > blocks]
        if beyond:
            said = f"distance {beyond[0]} is beyond the model, which has {blocks} blocks; the nearest valid is {blocks}"
            raise FieldError("method.adapter.layers", said)
        return set(spec.layers)
    third = math.ceil(blocks / 3)
    top, bottom = set(range(1, third + 1)), set(range(blocks - third + 1, blocks + 1))
    everything = set(range(1, blocks + 1))
    parts = {"all": everything, "top": top, "bottom": bottom, "middle": everything - top - bottom or everything}
    return parts[spec.layers]


def moves_weight(spec: object) -> bool:
    """Whether an adapter starts with a part of the base weights, so that those change with it."""
    return isinstance(spec, Lora) and spec.init in _STARTS


def move_weight_into_adapter(
    tuned: nn.Module, spec: object, file: Path, resumes: bool, device: str | torch.device = "cpu"
) -> None:
    """Move the adapter's share of the base weights into it, as `file` says, which is written where it is missing.

    A resumed run finds the same remainder bit by bit; raises TrainingError where it cannot.
    """
    if not (isinstance(spec, Lora) and moves_weight(spec)):
        return
    layers = {name: module for name, module in tuned.named_modules() if isinstance(module, LoraLayer)}
    if not file.is_file():
        if resumes:
            raise TrainingError(f"{file}: is missing, and without it this run cannot go on; train again from the start")
        _write(file, layers, spec.init, device)
    stored = load_file(file)
    if set(stored) != {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}:
        raise TrainingError(f"{file}: holds other layers than this recipe adapts; train again from the start")
    with torch.no_grad():
        for name, layer in layers.items():
            down, up = stored[f"{name}.lora_A"], stored[f"{name}.lora_B"]
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up)
            moved = layer.scaling["default"] * (up @ down)
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() - (moved.T if layer.fan_in_fan_out else moved))
    tuned.__dict__[_KEPT] = stored


def _write(file: Path, layers: dict[str, LoraLayer], init: str, device: str | torch.device) -> None:
    made: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.detach().float().to(device)
        down, up = _STARTS[init](weight.T if layer.fan_in_fan_out else weight, layer.r["default"])
        root = math.sqrt(layer.scaling["default"]) if init == "pissa" else 1.0
        made[f"{name}.lora_A"] = (down / root).cpu().contiguous()
        made[f"{name}.lora_B"] = (up / root).cpu().contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file(made, partial)
    with partial.open("rb") as opened:
        os.fsync(opened.fileno())
    partial.rename(file)


def _pissa(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The principal part of a weight, halved between A and B (Meng 2024)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal B and the triangular A of a weight's QR decomposition (Büyükakyüz 2024)."""
    orthonormal, triangular = torch.linalg.qr(weight)
    return triangular[:rank], orthonormal[:, :rank]


_STARTS = {"pissa": _pissa, "olora": _olora}


def rebase_on_original(model: PeftModel, file: Path) -> None:
    """Rewrite a saved adapter so that it fits the base as it was: twice the rank, with the start subtracted."""
    initial = model.__dict__.get(_KEPT)
    if initial is None:
        return
    stored = load_file(file)
    for name, down in initial.items():
        key = f"{name}.weight"
        now = stored[key]
        stored[key] = torch.cat([now, down], 0) if name.endswith("lora_A") else torch.cat([now, -down], 1)
    save_file(stored, file, metadata={"format": "pt"})
    settings_file = file.with_name("adapter_config.json")
    settings = json.loads(settings_file.read_text())
    factor = math.sqrt(2) if settings["use_rslora"] else 2
    settings["r"] *= 2
    settings["lora_alpha"] *= factor
    settings["rank_pattern"] = {key: 2 * rank for key, rank in settings["rank_pattern"].items()}
    settings["alpha_pattern"] = {key: factor * alpha for key, alpha in settings["alpha_pattern"].items()}
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def stored_elements(spec: object, tensors: dict[str, nn.Parameter]) -> int:
    """How many numbers the delta will hold: each trained one, and the start of an adapter that took weight."""
    twice = moves_weight(spec)
    return sum(p.numel() * (2 if twice and (".lora_A." in n or ".lora_B." in n) else 1) for n, p in tensors.items())
