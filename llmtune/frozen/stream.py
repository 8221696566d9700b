"""A base of which the low blocks never are in memory together: each is read from the safetensors files when it runs."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llmtune.errors import FieldError, RecipeError
from llmtune.frozen.boundary import find_randomness
from llmtune.memory import trim_heap
from llmtune.model.base import Base, build_skeleton, load_config
from llmtune.model.blocks import blocks
from llmtune.model.layout import Layout
from llmtune.plan.table import CacheSize
from llmtune.recipe.sections import Recipe

KEY = "memory.frozen_blocks"


class _UnreadTensor:
    """Stands for a stored tensor that is not to be read."""

    def __init__(self, shape: list[int]) -> None:
        self._shape = shape

    def __getitem__(self, index: Any) -> "_UnreadTensor":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self._shape, dtype=dtype, device="meta")


class OffloadedBlocks:
    """The stored weights of a base, of whose first `low` blocks each is lent to a model for as long as it runs."""

    def __init__(self, base: Base, low: int, dtype: torch.dtype, skeleton: PreTrainedModel | None = None) -> None:
        """Read names and shapes alone; raises RecipeError where the files are not those of a model."""
        self.low = low
        self._base, self._dtype, self._config = base, dtype, load_config(base)
        skeleton = skeleton or build_skeleton(base)
        self._class = type(skeleton)
        self._stored = _stored(base)
        listed = blocks(skeleton)
        path = next(name for name, module in skeleton.named_modules() if module is listed)
        inside = {name: at for at in range(low) for name in _names(listed[at], f"{path}.{at}.")}
        self._block = {key: inside.get(target) for key, target in _targets(skeleton, list(self._stored)).items()}

    def load(self) -> PreTrainedModel:
        """The base in evaluation mode, as from `model.load_model`, but for the low blocks, whose parameters are empty.

        Raises RecipeError where the files lack a tensor of those blocks.
        """
        made = self._read(lambda block: block is None)
        for at, block in enumerate(blocks(made)[: self.low]):
            for name, parameter in list(block.named_parameters()):
                if not parameter.is_meta:
                    raise RecipeError(f"model.base: {self._base.name} stores no {name} of block {at}")
                module, _, leaf = name.rpartition(".")
                empty = torch.empty(0, dtype=parameter.dtype)
                setattr(block.get_submodule(module), leaf, nn.Parameter(empty, requires_grad=False))
        return made

    @contextmanager
    def lent(self, at: int, block: nn.Module) -> Iterator[None]:
        """Give a block its weights, and take them away again."""
        stored = blocks(self._read(lambda owner: owner == at))[at]
        live = dict(block.named_parameters())
        for name, parameter in stored.named_parameters():
            live[name].data = parameter.data.to(live[name].device)
        del stored, parameter
        yield
        for parameter in live.values():
            parameter.data = parameter.data.new_empty(0)
        trim_heap()

    @contextmanager
    def lending(self, listed: list[nn.Module]) -> Iterator[None]:
        """Give each of a model's low blocks its weights whenever it is about to compute, for as long as it does."""
        with ExitStack() as handles:
            for at, block in enumerate(listed[: self.low]):
                handles.enter_context(self._on_demand(at, block))
            yield

    @contextmanager
    def _on_demand(self, at: int, block: nn.Module) -> Iterator[None]:
        loan = ExitStack()

        def before(module: nn.Module, arguments: Any) -> None:
            # What stands in for a block needs no weights, and a block may hold them already.
            if "forward" not in vars(block) and not all(parameter.numel() for parameter in block.parameters()):
                loan.enter_context(self.lent(at, block))

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            loan.close()

        handles = [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
        with loan:
            yield
        for handle in handles:
            handle.remove()

    def _read(self, wanted: Callable[[int | None], bool]) -> PreTrainedModel:
        """The model with the tensors of the wanted blocks (None: outside the low ones), all else on the meta device."""
        read = {key for key, block in self._block.items() if wanted(block)}
        lazy: dict[str, Any] = {
            key: _UnreadTensor(shape) for key, (_, shape) in self._stored.items() if key not in read
        }
        with ExitStack() as opened:
            for file in sorted({self._stored[key][0] for key in read}):
                stored = opened.enter_context(safe_open(file, framework="pt"))
                lazy |= {key: stored.get_slice(key) for key in read if self._stored[key][0] == file}
            made: Any = self._class.from_pretrained(
                None, config=self._config, state_dict=lazy, dtype=self._dtype, local_files_only=True
            )
        result: PreTrainedModel = made.eval()
        return result


def load_offloaded(
    base: Base, recipe: Recipe, layout: Layout, dtype: torch.dtype
) -> tuple[PreTrainedModel, OffloadedBlocks]:
    """The base without the blocks below every stage's boundary, and the blocks that it is lent when they run."""
    if PartialState().distributed_type != DistributedType.NO:
        raise _not_alone(recipe)
    offloaded = OffloadedBlocks(base, min(layout.boundaries), dtype, layout.skeleton)
    return offloaded.load(), offloaded


def count_offloaded(recipe: Recipe, layout: Layout) -> int:
    """How many parameters stay on disk; raises FieldError for what cannot be streamed."""
    if recipe.memory.frozen_blocks != "stream":
        return 0
    if recipe.model.quantize != "none":
        raise FieldError(KEY, "stream reads no block into 4 bits; try cache, or model.quantize: none")
    low, high = min(layout.boundaries), max(layout.boundaries)
    if low == 0 and layout.plan.redrawn:
        raise FieldError(KEY, "stream needs blocks that never train, and here any block may be drawn; try auto")
    if low == 0:
        message = "stream needs blocks that never train, and this plan trains the lowest one"
        raise FieldError(KEY, f"{message}; try auto, or a smaller reach")
    listed = list(blocks(layout.tuned))
    reason = find_randomness(layout.tuned, listed[high:])
    if reason:
        raise FieldError(KEY, f"stream needs outputs that stay the same: {reason}; try recompute")
    return sum(parameter.numel() for block in listed[:low] for parameter in block.parameters())


def check_disk(recipe: Recipe, size: CacheSize, processes: int) -> None:
    """Raise FieldError where streaming takes more disk than the recipe allows, or cannot run in these processes."""
    if recipe.memory.frozen_blocks != "stream":
        return
    if processes > 1 or recipe.launch.accelerate in ("fsdp2", "zero2", "zero3"):
        raise _not_alone(recipe)
    need = min(2, size.boundaries[0]) * (size.bytes or 0) / len(size.boundaries) / 2**30
    if need > recipe.memory.cache_limit_gb:
        message = f"stream needs {need:.2g} GB of disk, for the outputs of two blocks at a time"
        nearest = math.ceil(need * 100) / 100
        raise FieldError("memory.cache_limit_gb", f"{message}; try {nearest:g}")


def _not_alone(recipe: Recipe) -> RecipeError:
    return FieldError(KEY, "stream is for one process with whole weights; try auto")


def _stored(base: Base) -> dict[str, tuple[Path, list[int]]]:
    """The file in which each tensor of a base lies, and its shape; raises RecipeError where that cannot be told."""
    single, index = base.folder / "model.safetensors", base.folder / "model.safetensors.index.json"
    if not (single.is_file() or index.is_file()):
        raise RecipeError(f"model.base: {base.folder} holds neither {single.name} nor {index.name}: it cannot stream")
    names = [single.name] if single.is_file() else sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found: dict[str, tuple[Path, list[int]]] = {}
    for file in (base.folder / name for name in names):
        if not file.is_file():
            raise RecipeError(f"model.base: {base.name} lacks {file.name}, which its index names")
        with safe_open(file, framework="pt") as stored:
            found |= {key: (file, stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    return found


def _names(block: nn.Module, path: str) -> list[str]:
    return [path + name for name, _ in block.named_parameters()]


def _targets(skeleton: PreTrainedModel, keys: list[str]) -> dict[str, str]:
    """The name of a parameter that each stored tensor becomes, or becomes a part of, as transformers loads it."""
    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    targets = {key: rename_source_key(key, renamings, converters, prefix, own)[0] for key in keys}
    plain = {key: rename_source_key(key, [], [], prefix, own)[0] for key in keys}
    return {key: plain[key] if name not in own and key in own else name for key, name in targets.items()}
