"""What the steps after training take: evaluation and chat on the card, the merge in main memory."""

from dataclasses import dataclass

from llmtune.estimate.memory import NF4_BYTES, Setting
from llmtune.model.layout import Layout

ANSWERS = 2 * 2**30
"""Bytes of the keys and values of a batch of answers, and of its logits: 1 GiB each at the most."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes, and at the least where it can do with less."""

    need: int
    least: int


def evaluation(layout: Layout, setting: Setting) -> StepMemory:
    """Base and tuned model, one after the other, on the device; the least is the base in the 4 bits of the training."""
    parameters = layout.facts.parameters
    adapter = sum(one.numel() for one in layout.tuned.parameters()) - parameters
    parts = dict(layout.skeleton.named_parameters())
    quantized = sum(parts[f"{name}.weight"].numel() for name in layout.linear[0])
    width = setting.dtype.itemsize
    rest = width * (parameters - quantized) + 4 * adapter + ANSWERS
    return StepMemory(rest + width * quantized, round(rest + (NF4_BYTES if quantized else width) * quantized))


def merge(layout: Layout) -> StepMemory:
    """Main memory of the merge: the model in fp32, and a copy of its largest matrix."""
    largest = max(parameter.numel() for parameter in layout.skeleton.parameters())
    need = 4 * (layout.facts.parameters + 2 * largest)
    return StepMemory(need, need)
