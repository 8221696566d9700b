"""Goes on from what another training left: its adapter, or its trained tensors, put into a model before it trains."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from llmtune.adapters.base import AdapterSpec
from llmtune.adapters.delta import ADAPTER, BASE, TENSORS, Trained
from llmtune.adapters.kinds import KINDS
from llmtune.errors import FieldError
from llmtune.files import digest_of, fingerprint, read_json
from llmtune.model.files.locate import ADAPTER as ADAPTER_CONFIG

KEY = "model.start"
_FREE = (
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "task_type",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "init_weights",
    "lora_dropout",
    "vera_dropout",
    "layers_to_transform",
    "layers_pattern",
)
"""What of PEFT's configuration does not change what stored tensors mean, or is seen from their names."""

_OUTSIDE = re.compile(r"^.*?\.\d+\.")
"""The part of a layer's name up to the number of its block."""
_SHARED = {"vera_A", "vera_B", "base_model.vera_A", "base_model.vera_B"}
"""VeRA's matrices, which are no layer's."""


@dataclass(frozen=True)
class Start:
    """What a training goes on from: the delta of a run, or an adapter."""

    name: str
    """The recipe's name for it: a path, or a Hub id at a commit."""
    folder: Path
    """The files: of a run, its delta."""

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter; else it is trained tensors of the model itself."""
        return not (self.folder / TENSORS).is_file()

    @property
    def file(self) -> Path:
        """The file of tensors."""
        return self.folder / (ADAPTER if self.is_adapter else TENSORS)

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration of an adapter."""
        return dict(read_json(self.folder / ADAPTER_CONFIG))

    @property
    def base(self) -> dict[str, Any] | None:
        """What llmtune recorded of the base that it was trained on; None for an adapter of another tool."""
        return dict(read_json(self.folder / BASE)) if (self.folder / BASE).is_file() else None

    @property
    def files(self) -> dict[str, Any]:
        """Size and SHA-256 of what decides its values."""
        names = [self.file, *([self.folder / ADAPTER_CONFIG] if self.is_adapter else [])]
        return {file.name: fingerprint(file) for file in names}

    def facts(self) -> dict[str, Any]:
        """What is recorded of it: its name without folders, its kind, and one SHA-256 of its files."""
        kind = "adapter" if self.is_adapter else "tensors"
        # A run's delta is named delta in every run.
        parts = Path(self.name.rstrip("/"))
        return {"name": self.name if "@" in self.name else parts.name, "kind": kind, "sha256": digest_of(self.files)}

    def shapes(self) -> dict[str, list[int]]:
        """The stored tensors' names and shapes."""
        with safe_open(self.file, framework="pt") as stored:
            return {name: list(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118


def settle(adapter: AdapterSpec, start: Start, blocks: int) -> AdapterSpec:
    """The recipe's adapter with what it leaves open as it is in the start; raises FieldError where they contradict."""
    if not start.is_adapter:
        if not adapter.trains_base:
            message = f"{start.name} holds trained tensors, on which no adapter can go on as one delta"
            raise FieldError("method.adapter", f"{message}; merge it and name merged/ as model.base, or write none")
        return adapter
    kind = str(start.config.get("peft_type")).lower()
    if kind not in KINDS:
        raise FieldError(KEY, f"{start.name} is an adapter of the kind {kind}; llmtune trains {', '.join(KINDS)}")
    return adapter.continued(kind, start.config, _targets(start, blocks), start.name)


def _targets(start: Start, blocks: int) -> list[str]:
    """What is adapted: by its names in a block where each block has one of each, else by whole names."""
    targets = sorted(_adapted(start))
    ends = [_OUTSIDE.sub("", name) for name in targets]
    return sorted(set(ends)) if all(ends.count(end) == blocks for end in set(ends)) else targets


def _adapted(start: Start) -> set[str]:
    """The whole names of the layers and tensors of experts that a stored adapter goes to."""
    names = [name.removeprefix("base_model.model.") for name in start.shapes() if ".token_adapter." not in name]
    layers = {name.split(".lora_")[0].split(".ia3_")[0].split(".vera_lambda_")[0] for name in names} - _SHARED
    # PEFT stores the adapters of a module's tensors under the module's name, with one .base_layer after another.
    paths = {layer.replace(".base_layer", "") for layer in layers}
    tensors = [name.rpartition(".") for name in start.config.get("target_parameters") or ()]
    adapted = {
        path: {f"{path}.{leaf}".removesuffix(".weight") for module, _, leaf in tensors if _is_at(path, module)}
        for path in paths
    }
    return {name for path, inner in adapted.items() for name in inner or {path}}


def _is_at(path: str, module: str) -> bool:
    return path == module or path.endswith(f".{module}")


def check_start(start: Start, tuned: nn.Module, quantized: Collection[str]) -> None:
    """Raise FieldError where a start does not fit the model that is to train, which may be on the meta device.

    `quantized` are the names of the layers that are to be put into fewer bits.
    """
    stored = start.shapes()
    if isinstance(tuned, PeftModel):
        _check_config(start, tuned.peft_config["default"].to_dict())
        live = {name: list(one.shape) for name, one in _adapter_state(tuned).items()}
        both = {*stored, *live}
    else:
        live = {name: list(one.shape) for name, one in tuned.named_parameters()}
        both = set(stored)
        packed = next((name for name in sorted(stored) if name.removesuffix(".weight") in quantized), None)
        if packed:
            raise FieldError("model.quantize", f"would round {packed}, which {start.name} trained; remove that key")
    for name in sorted(both):
        if stored.get(name) != live.get(name):
            theirs, ours = (shapes.get(name, "none") for shapes in (stored, live))
            message = f"{start.name} does not fit what this recipe trains: of {name} it has {theirs}, the recipe {ours}"
            raise FieldError(KEY, f"{message} ({len(stored)} tensors there, {len(live)} here)")


def _check_config(start: Start, live: Mapping[str, Any]) -> None:
    stored = start.config
    for key in sorted({*stored} & {*live} - {*_FREE}):
        theirs, ours = (sorted(one) if isinstance(one, set | list) else one for one in (stored[key], live[key]))
        if (theirs or None) != (ours or None) and str(theirs) != str(ours):
            raise FieldError(KEY, f"{start.name} was trained with {key} {theirs!r}, and this recipe has {ours!r}")


def _adapter_state(tuned: PeftModel) -> dict[str, torch.Tensor]:
    return dict(get_peft_model_state_dict(tuned, save_embedding_layers=False))


@torch.no_grad()
def load_start(model: nn.Module, start: Start, trained: Collection[str]) -> None:
    """Put a start's values into a model, those of tensors that are to be `trained` in the precision they are stored in.

    Raises FieldError where they are not in the model afterwards as they are stored.
    """
    if isinstance(model, PeftModel):
        stored = load_file(start.file)
        set_peft_model_state_dict(model, stored)
        live = _adapter_state(model)
        odd = sorted({*stored} ^ {*live}) or [
            name for name, one in stored.items() if not torch.equal(one, live[name].to("cpu", one.dtype))
        ]
        if odd:
            raise FieldError(KEY, f"{start.name}: {odd[0]} was not loaded as it is stored")
        return
    parameters = dict(model.named_parameters())
    with safe_open(start.file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            parameter, tensor = parameters[name], tensors.get_tensor(name)
            if name in trained:
                parameter.data = tensor.to(parameter.device)
            else:
                parameter.copy_(tensor)


def add_rest(trained: Trained, start: Start) -> Trained:
    """Trained tensors together with those that the start changed and this training did not."""
    if start.is_adapter:
        return trained
    return {**load_file(start.file), **(load_file(trained) if isinstance(trained, Path) else trained)}
