"""A base whose lowest blocks are never in memory together: each is read from the safetensors files when it runs."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from llmtune.errors import FieldError, LlmtuneError, RecipeError
from llmtune.frozen.boundary import find_randomness
from llmtune.machine.memory import trim_heap
from llmtune.model.base import Base, build_skeleton, load_config
from llmtune.model.blocks import blocks
from llmtune.model.files.stored import stored_tensors
from llmtune.model.layout import Layout
from llmtune.model.parts import load_partly, parameter_names
from llmtune.numbers import size as number_of_bytes
from llmtune.plan.table import CacheSize
from llmtune.recipe.sections import Recipe

KEY = "memory.frozen_blocks"


class OffloadedBlocks:
    """The lowest `count` blocks of a base, whose weights stay on disk except while a block runs."""

    def __init__(self, base: Base, count: int, dtype: torch.dtype, skeleton: PreTrainedModel | None = None) -> None:
        """Read only names and shapes; raises RecipeError where the files are not those of a model."""
        self.count = count
        self._base, self._dtype, self._config = base, dtype, load_config(base)
        skeleton = skeleton or build_skeleton(base)
        self._class = type(skeleton)
        self._stored = stored_tensors(base.folder, base.name)
        listed = blocks(skeleton)
        path = next(name for name, module in skeleton.named_modules() if module is listed)
        owner = {
            f"{path}.{index}.{name}": index for index in range(count) for name, _ in listed[index].named_parameters()
        }
        self._block = {key: owner.get(name) for key, name in parameter_names(skeleton, list(self._stored)).items()}

    def load(self) -> PreTrainedModel:
        """The base in evaluation mode, as from `load_model`, but the parameters of the lowest blocks are empty."""
        model = self._read(lambda block: block is None)
        for block in blocks(model)[: self.count]:
            for name, parameter in list(block.named_parameters()):
                module, _, leaf = name.rpartition(".")
                empty = torch.empty(0, dtype=parameter.dtype)
                setattr(block.get_submodule(module), leaf, nn.Parameter(empty, requires_grad=False))
        return model

    @contextmanager
    def loaded(self, index: int, block: nn.Module) -> Iterator[None]:
        """Load a block's weights, and free them at the end."""
        stored = blocks(self._read(lambda owner: owner == index))[index]
        live = dict(block.named_parameters())
        for name, parameter in stored.named_parameters():
            live[name].data = parameter.data.to(live[name].device)
        del stored, parameter
        yield
        for parameter in live.values():
            parameter.data = parameter.data.new_empty(0)
        trim_heap()

    @contextmanager
    def loading_on_demand(self, listed: list[nn.Module]) -> Iterator[None]:
        """Load each of a model's lowest blocks when it is about to compute, and free it afterwards."""
        with ExitStack() as hooks:
            for index, block in enumerate(listed[: self.count]):
                hooks.enter_context(self._on_demand(index, block))
            yield

    @contextmanager
    def _on_demand(self, index: int, block: nn.Module) -> Iterator[None]:
        weights = ExitStack()

        def load(module: nn.Module, arguments: object) -> None:
            # A stub needs no weights, and a block may have its weights already.
            if "forward" not in vars(block) and not all(parameter.numel() for parameter in block.parameters()):
                weights.enter_context(self.loaded(index, block))

        def free(module: nn.Module, arguments: object, output: object) -> None:
            weights.close()

        hooks = [block.register_forward_pre_hook(load), block.register_forward_hook(free)]
        with weights:
            yield
        for hook in hooks:
            hook.remove()

    def _read(self, chosen: Callable[[int | None], bool]) -> PreTrainedModel:
        """The model with the tensors of the chosen blocks (None: outside the lowest), the others on the meta device."""
        keys = {key for key, block in self._block.items() if chosen(block)}
        return load_partly(self._base.name, self._class, self._config, self._stored, keys, self._dtype)


def load_offloaded(base: Base, layout: Layout, dtype: torch.dtype) -> tuple[PreTrainedModel, OffloadedBlocks]:
    """The base with the blocks below every stage's boundary offloaded, and those blocks."""
    if PartialState().distributed_type != DistributedType.NO:
        raise _not_alone()
    offloaded = OffloadedBlocks(base, min(layout.boundaries), dtype, layout.skeleton)
    return offloaded.load(), offloaded


def check_offloaded(recipe: Recipe, layout: Layout) -> None:
    """Raise FieldError for a plan or model whose lowest blocks cannot be streamed."""
    if recipe.memory.frozen_blocks != "stream":
        return
    if recipe.model.quantize != "none":
        raise FieldError(KEY, "stream quantizes no block that it reads; try cache, or model.quantize: none")
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


def check_disk(recipe: Recipe, size: CacheSize, processes: int) -> None:
    """Raise FieldError where streaming takes more disk than the recipe allows, or cannot run in these processes."""
    if recipe.memory.frozen_blocks != "stream":
        return
    if processes > 1 or recipe.launch.accelerate == "fsdp2":
        raise _not_alone()
    need = min(2, size.boundaries[0]) * (size.bytes or 0) / len(size.boundaries)
    if need > recipe.memory.cache_limit:
        raise too_low_limit(need)


def too_low_limit(need: float, kind: type[LlmtuneError] = RecipeError) -> FieldError:
    """The error of a cache that may not take the bytes that streaming needs, with the limit that is enough."""
    message = f"stream needs {number_of_bytes(need)} of disk, for the outputs of two blocks at a time"
    enough = math.ceil(need / 10**7) / 100
    return FieldError("memory.cache_limit_gb", f"{message}; try {enough:g}", kind)


def _not_alone() -> FieldError:
    return FieldError(KEY, "stream is for one process with whole weights; try auto")
