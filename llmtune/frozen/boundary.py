"""Which boundaries of a plan's stages are worth caching, and where none can be cached."""

from collections.abc import Sequence
from dataclasses import dataclass

from bitsandbytes.nn import Linear8bitLt
from torch import nn

WORTH = 0.05


@dataclass(frozen=True)
class Span:
    """Steps that share a boundary: how many times a row passes through the `boundary` blocks below it."""

    boundary: int
    passes: int


def choose_boundaries(spans: list[Span], kept: set[int], rows: int, size: int, limit: int, always: bool) -> list[int]:
    """The boundaries to keep: those that save the most passes through blocks, building included, within `limit` bytes.

    `kept` are there already; `size` is what one boundary takes.
    """
    useful = sorted({span.boundary for span in spans if span.boundary})
    best, most = sorted(kept & set(useful)), 0.0
    for top in useful:
        chosen = [boundary for boundary in useful if boundary <= top or boundary in kept]
        missing = [boundary for boundary in chosen if boundary not in kept]
        if not missing or size * len(chosen) > limit:
            continue
        start = max((boundary for boundary in kept if boundary < missing[0]), default=0)
        cost = rows * (missing[-1] - start)
        saved = sum(span.passes * span.boundary for span in spans if span.boundary in missing)
        gain = saved - cost * (1 + WORTH)
        if gain > most or (always and top == useful[-1]):
            best, most = chosen, gain
    return best


def find_randomness(model: nn.Module, above: Sequence[nn.Module]) -> str | None:
    """What makes the part outside the blocks `above` differ from pass to pass: a dropout above 0, by name, or None.

    LLM.int8 computes whole columns apart where any row of a pass has a large number in them.
    """
    ignored = {id(module) for block in above for module in block.modules()}
    for name, module in model.named_modules():
        if id(module) in ignored:
            continue
        if isinstance(module, Linear8bitLt):
            return f"{name} is in 8 bits, whose outputs for a row depend on the rows beside it"
        rates = {key: value for key, value in vars(module).items() if "drop" in key or "jitter" in key}
        if isinstance(module, nn.Dropout):
            rates = {"p": module.p}
        for key, value in rates.items():
            if isinstance(value, float) and value > 0:
                return f"{name}.{key} is {value:g}, so its outputs differ from pass to pass"
    return None
