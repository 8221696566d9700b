"""The memory that training takes, predicted part by part for each stage and device."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from llmtune.estimate.activations import as_trained, trace
from llmtune.estimate.optimizers import state_bytes
from llmtune.estimate.trace import Trace
from llmtune.kernels.head import HEAD_CHUNK_BYTES, LOGIT_BYTES
from llmtune.model.blocks import blocks
from llmtune.model.files.stored import SHARD_BYTES
from llmtune.model.layout import Layout
from llmtune.model.quantize import WEIGHT_BYTES

COPIES = "16-bit copies of weights"
ANSWERS = 2 * 2**30
"""Bytes of the keys and values of a batch of answers, and of its logits: 1 GiB each at the most."""


@dataclass(frozen=True)
class Setting:
    """Where and how one process computes."""

    device: Literal["cuda", "cpu"]
    dtype: torch.dtype
    world: int = 1
    sharded: bool = False
    """Whether weights, gradients and states are split over the processes."""
    optimizer: str = "adamw"
    streamed: bool = False
    """Whether the blocks that never train stay on disk."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one device in one stage, by part; activations are those of one token of the longest row."""

    parts: dict[str, int]
    """What does not grow with a pass."""
    plain: float
    """Bytes a token without checkpointing, less its logits."""
    checkpointed: float
    """Bytes a token with checkpointing."""
    logits: int
    """Bytes of a token's logits and of what is computed from them."""
    chunk: float
    """The most that the logits of one time take."""
    trace: Trace = field(repr=False)
    unchecked: int = 0
    """Bytes that a pass of any size needs beside `parts` without checkpointing."""
    optional: int = 0
    """Of the 16-bit copies in `parts`, what CPUs can do without."""

    @property
    def fixed(self) -> int:
        """Bytes that a pass of any size needs with checkpointing."""
        return sum(self.parts.values())

    def per_token(self, checkpointing: bool) -> float:
        """Bytes that a pass needs for each of its tokens."""
        return self.checkpointed if checkpointing else self.plain

    def peak(self, tokens: int, checkpointing: bool) -> int:
        """The most bytes at one time, in passes of so many tokens."""
        beside = 0 if checkpointing else self.unchecked
        return round(self.fixed + beside + tokens * self.per_token(checkpointing) + self._head(tokens))

    def room(self, free: float, checkpointing: bool) -> int:
        """The most tokens of a pass for which `free` bytes are enough; 0 or less where none fits."""
        each, left = self.per_token(checkpointing), free - self.fixed - (0 if checkpointing else self.unchecked)
        whole = left / (each + self.logits)
        return int(whole if whole * self.logits <= self.chunk else (left - self.chunk) / each)

    def _head(self, tokens: int) -> int:
        return round(min(self.chunk, tokens * self.logits))

    def listed(self, tokens: int, checkpointing: bool) -> dict[str, int]:
        """Every part in bytes, activations included."""
        activations = round(tokens * self.per_token(checkpointing)) + (0 if checkpointing else self.unchecked)
        return {**self.parts, "activations": activations, "logits": self._head(tokens)}


@dataclass(frozen=True)
class Forecast:
    """The memory of every stage of a plan."""

    stages: list[StageMemory]

    def peak(self, tokens: int, checkpointing: bool) -> int:
        """The most bytes that any stage takes, in passes of so many tokens."""
        return max(stage.peak(tokens, checkpointing) for stage in self.stages)

    def room(self, free: float, checkpointing: bool) -> int:
        """The most tokens of a pass for which `free` bytes are enough in every stage; 0 or less where none fits."""
        return min(stage.room(free, checkpointing) for stage in self.stages)


def forecast(layout: Layout, setting: Setting, longest: int) -> Forecast:
    """The memory of training under a plan, for rows of up to `longest` tokens."""
    known: Forecast | None = layout.forecasts.get((setting, longest))
    if known is None:
        counted = _Counted(layout, setting)
        known = Forecast([counted.stage(now, reached, longest) for now, reached in _trained_by_stage(layout)])
        layout.forecasts[setting, longest] = known
    return known


def fixed_bytes(layout: Layout, setting: Setting) -> int:
    """Bytes of weights, gradients and optimizer states on one device, in the stage that holds the most."""
    counted = _Counted(layout, setting)
    return max(sum(counted.states(now, reached).values()) for now, reached in _trained_by_stage(layout))


def _trained_by_stage(layout: Layout) -> list[tuple[set[str], set[str]]]:
    """For each stage the tensors that train at one time, and those that have states by its end."""
    stages, reached = [], set[str]()
    for stage in layout.plan.stages:
        distances = stage.trains.deepest(set(layout.trained_distance.values()))
        now = {name for name, distance in layout.trained_distance.items() if distance in distances}
        reached = now if layout.plan.redrawn else reached | now
        stages.append((now, reached))
    return stages


class _Counted:
    """Counts what a plan's stages hold on one device."""

    def __init__(self, layout: Layout, setting: Setting) -> None:
        self._layout, self._setting = layout, setting
        self._size = {name: tensor.numel() for name, tensor in layout.tuned.named_parameters()}
        self._shares = setting.world if setting.sharded else 1
        tables = {id(module.weight) for module in layout.tuned.modules() if isinstance(module, nn.Embedding)}
        self._embeddings = {name for name, tensor in layout.tuned.named_parameters() if id(tensor) in tables}

    def stage(self, now: set[str], reached: set[str], longest: int) -> StageMemory:
        """The memory of a stage that trains the tensors `now`, where `reached` have trained by its end."""
        setting, trained = self._setting, sum(self._size[name] for name in now)
        model = as_trained(self._layout.tuned, now, set(self._layout.trained), setting.dtype)
        # An odd number of tokens: no activation has the shape of a weight.
        kept = trace(model, longest | 1, setting.dtype, setting.device)
        parts = {
            **self.states(now, reached),
            COPIES: 0 if setting.sharded else kept.casts,
            "gathered weights": self._gathered() if setting.sharded else 0,
            "buffers between processes": 4 * trained if setting.world > 1 and not setting.sharded else 0,
            "experts with their updates": 2 * max(kept.folded, default=0),
            "in passing": self._passing(now),
        }
        head, width = self._layout.skeleton.get_output_embeddings().weight, setting.dtype.itemsize
        position = (2 * width + 4) * head.shape[1]  # a supervised position's hidden state, and its gradient
        plain, checkpointed = (kept.peak(each) / kept.tokens + position for each in (False, True))
        on_gpu = setting.device == "cuda"
        logits = (LOGIT_BYTES if on_gpu else 2 * width) * head.shape[0]
        # The sums of all blocks are kept until their backward passes; the largest, and its gradient, are in `parts`.
        unchecked = sum(kept.folded) - max(kept.folded, default=0)
        filled = {name: size for name, size in parts.items() if size}
        chunk, optional = (HEAD_CHUNK_BYTES, 0) if on_gpu else (math.inf, 0 if setting.sharded else kept.spared_casts)
        return StageMemory(filled, plain, checkpointed, logits, chunk, kept, unchecked, optional)

    def states(self, now: set[str], reached: set[str]) -> dict[str, int]:
        """Weights, gradients of `now` and optimizer states of `reached`, in bytes on one device."""
        shapes: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        for name in reached:
            shapes[name in self._embeddings].append(tuple(self._layout.trained[name].shape))
        return {
            "weights": self._weights(),
            "gradients": 4 * sum(self._size[name] for name in now) // self._shares,
            "optimizer": state_bytes(self._setting.optimizer, shapes[False], shapes[True]) // self._shares,
        }

    def _weights(self) -> int:
        layout, width = self._layout, self._setting.dtype.itemsize
        trained = sum(self._size[name] for name in layout.trained)
        low = blocks(layout.tuned)[: min(layout.boundaries)] if self._setting.streamed else ()
        offloaded = sum(parameter.numel() for block in low for parameter in block.parameters())
        frozen = sum(self._size.values()) - trained - offloaded
        buffers = sum(buffer.numel() * buffer.element_size() for buffer in layout.tuned.buffers())
        quantized = sum(_weight(layout.skeleton, name).numel() for name in layout.linear[0])
        whole = 4 * trained + width * (frozen - quantized)
        return round(whole / self._shares + _bytes(layout, width) * quantized) + buffers

    def _gathered(self) -> int:
        """What is whole at one time of sharded weights: all outside the blocks, two blocks, the gradients of one."""
        layout = self._layout
        inside = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks(layout.tuned)]
        outside = sum(self._size.values()) - sum(inside)
        ids = {id(parameter) for parameter in layout.trained.values()}
        trained = [sum(p.numel() for p in block.parameters() if id(p) in ids) for block in blocks(layout.tuned)]
        return self._setting.dtype.itemsize * (outside + 2 * max(inside)) + 6 * max(trained)

    def _passing(self, now: set[str]) -> int:
        """The gradient of the largest matrix before it is added, in both precisions; an unpacked matrix."""
        width = 4 if self._setting.dtype == torch.float32 else 6
        unpacked = [_weight(self._layout.skeleton, name).numel() for name in self._layout.linear[0]]
        return width * max((self._size[name] for name in now), default=0) + 2 * max(unpacked, default=0)


def _bytes(layout: Layout, width: int) -> float:
    """Bytes of a number in a quantized layer, `width` where none is quantized."""
    return WEIGHT_BYTES[layout.bits] if layout.bits else width


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name).get_parameter("weight")


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes, and at the least where it can do with less."""

    need: int
    least: int


def evaluation_memory(layout: Layout, setting: Setting) -> StepMemory:
    """Base and tuned model, one after the other, on the device; the least is the base as it was trained."""
    parameters = layout.facts.parameters
    adapter = sum(one.numel() for one in layout.tuned.parameters()) - parameters
    parts = dict(layout.skeleton.named_parameters())
    quantized = sum(parts[f"{name}.weight"].numel() for name in layout.linear[0])
    width = setting.dtype.itemsize
    rest = width * (parameters - quantized) + 4 * adapter + ANSWERS
    return StepMemory(rest + width * quantized, round(rest + _bytes(layout, width) * quantized))


def merge_memory(layout: Layout, dtype: torch.dtype) -> StepMemory:
    """Main memory of the merge."""
    need = merge_bytes(layout.skeleton, dtype, quantized=bool(layout.linear[0]))
    return StepMemory(need, need)


def merge_bytes(skeleton: PreTrainedModel, dtype: torch.dtype, whole: bool = False, quantized: bool = False) -> int:
    """Bytes of a merge: the file that is written, or the `whole` model, and the largest part in fp32 with its change.

    A quantized run is compared with its base dequantized to fp32.
    """
    parts: list[nn.Module] = [*blocks(skeleton), skeleton.get_input_embeddings()]
    largest = max(sum(parameter.numel() for parameter in part.parameters()) for part in parts)
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    written = dtype.itemsize * weights
    need = (written if whole else min(written, SHARD_BYTES)) + 12 * largest
    return max(need, 4 * weights) if quantized else need
