"""Writes merged weights file by file: what the delta changes is merged in fp32 and rounded, all else is copied."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llmtune.errors import ProofError
from llmtune.files import write_json
from llmtune.kernels.finite import is_finite
from llmtune.machine.memory import trim_heap
from llmtune.merging.shards.change import Change, Tuned
from llmtune.merging.shards.hollow import Weights
from llmtune.merging.shards.stored import StoredWeights, UnsupportedError
from llmtune.model.files.stored import INDEX, SHARD_BYTES, SINGLE
from llmtune.working import working


@dataclass
class Part:
    """Parameters that a delta changes together, and the adapted layers that change them."""

    parameters: dict[str, nn.Parameter]
    layers: list[nn.Module]


def find_parts(tuned: Tuned, weights: Weights, change: Change, stock: PreTrainedModel) -> list[Part]:
    """What a delta changes, a layer at a time; raises UnsupportedError for what cannot be written so.

    `stock` is the merged model without its weights.
    """
    parts: list[Part] = []
    layers = [wide.layers for wide in change.wide.values()] or [[layer] for layer in _outermost(tuned)]
    for group in layers:
        own = {weights.names[one]: one for layer in group for one in layer.parameters() if one in weights.names}
        shared = next((part for part in parts if part.parameters.keys() & own.keys()), None)
        if shared is None:
            parts.append(Part(own, list(group)))
        else:
            shared.parameters |= own
            shared.layers += group
    parameter = {name: one for one, name in weights.names.items()}
    parts += [Part({name: parameter[name]}, []) for name in weights.replaced]
    for part in parts:
        for name in part.parameters:
            _check_names(stock, weights.stored, name, part.parameters[name], bool(change.wide))
    return parts


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, BaseTunerLayer):
            yield child
        else:
            yield from _outermost(child)


def _check_names(
    stock: PreTrainedModel, stored: StoredWeights, name: str, parameter: nn.Parameter, widens: bool
) -> None:
    """Raise UnsupportedError where a parameter would be written under other names or shapes than the base's."""
    if name in stored.converted and widens:
        raise UnsupportedError(f"{name} becomes wider, and is not stored in its own shape")
    if name in stored.converted:
        empty = revert_weight_conversion(stock, {name: torch.empty(parameter.shape, device="meta")})
        written = {key: list(tensor.shape) for key, tensor in empty.items()}
        if written != {key: stored.tensors[key].shape for key in stored.keys[name]}:
            raise UnsupportedError(f"{name} is not written as it is read")


@dataclass
class Merger:
    """What merges parts of a model and rounds them."""

    weights: Weights
    change: Change
    stock: PreTrainedModel
    """The merged model without its weights."""
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Know the shapes that the merged model has."""
        self._shapes = {name: tensor.shape for name, tensor in self.stock.state_dict().items()}

    def merge(self, part: Part) -> dict[str, dict[str, torch.Tensor]]:
        """What a part's changed parameters become: stored tensors, by the parameters' names."""
        own = self.weights.fill(part.parameters.values())
        before = self._before(own)
        self.change.add(part.layers)
        changed = {}
        for name, parameter in own.items():
            if parameter.shape != self._shapes[name] or not is_finite(parameter):
                reason = "is not finite" if parameter.shape == self._shapes[name] else "has another shape in the model"
                raise ProofError(f"{name}: {reason}; the delta is damaged, or its training diverged")
            narrow = rounded(name, parameter.data, self.dtype)
            if narrow.shape != before[name].shape or not torch.equal(narrow, before[name]):
                changed[name] = self._as_stored(name, parameter.data, narrow)
        self.weights.empty(part.parameters.values())
        self.change.forget(part.layers)
        return changed

    def _before(self, own: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """The base's numbers, rounded; they are read again only where a delta's are in memory."""
        replaced = self.weights.stored.read([name for name in own if name in self.weights.replaced])
        numbers = {name: replaced.get(name, parameter.data) for name, parameter in own.items()}
        return {name: one.to(self.dtype, copy=name not in replaced) for name, one in numbers.items()}

    def _as_stored(self, name: str, tensor: torch.Tensor, narrow: torch.Tensor) -> dict[str, torch.Tensor]:
        stored = self.weights.stored
        if name not in stored.converted:
            first, *others = stored.keys[name]
            return {first: narrow, **{key: narrow.clone() for key in others}}
        reverted = revert_weight_conversion(self.stock, {name: tensor})
        return {key: rounded(key, one, self.dtype).contiguous() for key, one in reverted.items()}


def write_weights(merger: Merger, parts: list[Part], folder: Path) -> int:
    """Write every tensor of the base to files like the base's, merged and rounded; returns how many changed.

    One file of at most 5 GB is in memory at a time, and one part. Raises ProofError for a number that the dtype lacks.
    """
    stored, dtype, changed = merger.weights.stored, merger.dtype, 0
    part_of = {name: part for part in parts for name in part.parameters}
    ready: dict[str, torch.Tensor] = {}
    files = ShardWriter(folder)
    kept = {key: tensor.file for key, tensor in stored.tensors.items() if not stored.dropped(key)}
    words = f"writing the merged weights in {str(dtype).removeprefix('torch.')}"
    with working(words, len(kept), "tensors") as step:
        for file in sorted({*kept.values()}):
            with safe_open(file, framework="pt") as source:
                for key in (key for key in kept if kept[key] == file):
                    part = part_of.get(stored.owner.get(key, ""))
                    if part:
                        tensors = merger.merge(part)
                        part_of = {name: other for name, other in part_of.items() if other is not part}
                        ready |= {key: one for name in tensors for key, one in tensors[name].items()}
                    original = source.get_tensor(key)
                    if key in ready:
                        changed += not torch.equal(ready[key], original.to(dtype))  # of experts, some may be as before
                    files.add(key, ready.pop(key) if key in ready else rounded(key, original, dtype))
                    step()
            files.flush()
    files.finish()
    if ready or part_of:
        raise ProofError(f"{next(iter([*ready, *part_of]))} is in the delta, and was not merged; nothing was merged")
    return changed


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of real numbers in `dtype`, any other as it is; raises ProofError where a number becomes infinite."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    # Extremes take no memory; they are looked at closely only where one is infinite.
    if narrow.numel() and not all(one.isfinite() for one in narrow.aminmax()) and _overflows(narrow, tensor):
        largest, kind = float(tensor.abs().max()), str(dtype).removeprefix("torch.")
        raise ProofError(
            f"{name}: has a weight of {largest:.6g}, and {kind} ends at {torch.finfo(dtype).max:.6g}; "
            "nothing was merged; try merge.dtype: bfloat16"
        )
    return narrow


def _overflows(narrow: torch.Tensor, tensor: torch.Tensor) -> bool:
    return bool((narrow.isinf() & tensor.isfinite()).any())


class ShardWriter:
    """Writes tensors to files in the order in which they come, and an index where there are several."""

    def __init__(self, folder: Path, most: int | None = None) -> None:
        """Take the folder, and the bytes that a file has at most."""
        self._folder, self._most = folder, most or SHARD_BYTES
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes, self._total = 0, 0
        self._files: list[list[str]] = []

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Write a tensor, with others."""
        size = tensor.numel() * tensor.element_size()
        if self._bytes + size > self._most:
            self.flush()
        self._tensors[key] = tensor
        self._bytes += size
        self._total += size

    def flush(self) -> None:
        """Write what has come since the last file to a file of its own."""
        if self._tensors:
            self._files.append(list(self._tensors))
            save_file(self._tensors, self._folder / f"part-{len(self._files)}", metadata={"format": "pt"})
        self._tensors, self._bytes = {}, 0
        trim_heap()

    def finish(self) -> None:
        """Name the files as transformers expects them."""
        self.flush()
        count = len(self._files)
        index: dict[str, str] = {}
        for number, keys in enumerate(self._files, 1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._folder / f"part-{number}").rename(self._folder / name)
            index |= dict.fromkeys(keys, name)
        if count > 1:
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": index})
