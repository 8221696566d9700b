"""PiSSA and OLoRA: A and B start with a part of the base weights, and the saved adapter still fits the base."""

import json
import math
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.errors import TrainingError
from llmtune.files import write_file
from llmtune.machine import processes
from llmtune.working import working

INITIAL = "initial-adapter.safetensors"
_ATTRIBUTE = "_initial_adapter"


def move_weight(tuned: nn.Module, init: str, folder: Path, resumes: bool, device: str | torch.device = "cpu") -> None:
    """Take the start in `folder` out of the base weights and put it into A and B; compute it where it is missing.

    Every process must call it: together they compute the start, on `device`. A resumed run gets the same base weights,
    bit for bit; raises TrainingError where it cannot.
    """
    file = folder / INITIAL
    layers = {name: module for name, module in tuned.named_modules() if isinstance(module, LoraLayer)}
    if processes.broadcast(not file.is_file()):
        if resumes:
            raise TrainingError(f"{file}: is missing, and without it this run cannot go on; train again from the start")
        _write_start(file, layers, init, device)
    stored = load_file(file)
    if set(stored) != {f"{name}.{part}" for name in layers for part in ("lora_A", "lora_B")}:
        raise TrainingError(f"{file}: holds other layers than this recipe adapts; train again from the start")
    with torch.no_grad(), working("moving weight into the adapter", len(layers), "layers") as step:
        for name, layer in layers.items():
            down, up = stored[f"{name}.lora_A"], stored[f"{name}.lora_B"]
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up)
            weight = layer.get_base_layer().weight
            moved = (layer.scaling["default"] * (up @ down)).to(weight.device)
            weight.copy_(weight.float() - (moved.T if layer.fan_in_fan_out else moved))
            step()
    tuned.__dict__[_ATTRIBUTE] = stored


def _write_start(file: Path, layers: dict[str, LoraLayer], init: str, device: str | torch.device) -> None:
    """Write the start of every layer; each process computes its share of them, and the first one writes."""
    mine: dict[str, torch.Tensor] = {}
    names = processes.share(list(layers))
    with working(f"computing where {init} starts", len(names), "layers") as step:
        for name in names:
            layer = layers[name]
            weight = layer.get_base_layer().weight.detach().float().to(device)
            down, up = _STARTS[init](weight.T if layer.fan_in_fan_out else weight, layer.r["default"])
            root = math.sqrt(layer.scaling["default"]) if init == "pissa" else 1.0
            mine[f"{name}.lora_A"] = (down / root).cpu().contiguous()
            mine[f"{name}.lora_B"] = (up / root).cpu().contiguous()
            step()
        parts = processes.gather_on_first(mine)
    if parts:
        with write_file(file) as partial:
            save_file({name: tensor for part in parts for name, tensor in part.items()}, partial)
    processes.wait()


def _pissa(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B from a weight's largest singular values, halved between them (Meng 2024)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _olora(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the triangular A and the orthonormal B of a weight's QR decomposition (Büyükakyüz 2024)."""
    orthonormal, triangular = torch.linalg.qr(weight)
    return triangular[:rank], orthonormal[:, :rank]


_STARTS = {"pissa": _pissa, "olora": _olora}


def rebase_on_original(model: PeftModel, file: Path) -> None:
    """Rewrite a saved adapter so that it fits the base as it was: twice the rank, with the start subtracted."""
    initial = model.__dict__.get(_ATTRIBUTE)
    if initial is None:
        return
    stored = load_file(file)
    for name, start in initial.items():
        key = f"{name}.weight"
        trained = stored[key]
        joined = [trained, start] if name.endswith("lora_A") else [trained, -start]
        stored[key] = torch.cat(joined, 0 if name.endswith("lora_A") else 1)
    save_file(stored, file, metadata={"format": "pt"})
    settings_file = file.with_name("adapter_config.json")
    settings = json.loads(settings_file.read_text())
    factor = math.sqrt(2) if settings["use_rslora"] else 2
    settings["r"] *= 2
    settings["lora_alpha"] *= factor
    settings["rank_pattern"] = {key: 2 * rank for key, rank in settings["rank_pattern"].items()}
    settings["alpha_pattern"] = {key: factor * alpha for key, alpha in settings["alpha_pattern"].items()}
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
