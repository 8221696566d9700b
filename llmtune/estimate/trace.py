"""What a pass keeps for its backward pass, in numbers: measured on a model, or by a rule where that fails."""

from dataclasses import astuple, dataclass, field

import torch
from torch import nn

from llmtune.estimate.products import Products
from llmtune.model.blocks import blocks

_BEYOND_LAYERS = 1.25
"""What a block keeps, as a multiple of the inputs and outputs of its matrices: norms, activations, attention."""


@dataclass
class BlockTrace:
    """Bytes of one block: all it saves, what it is given first of all blocks, what it saves beyond what it is given."""

    saved: int
    input: int
    inner: int
    spared: int = 0
    """Of what it saves, what patched MLPs compute again instead, but for checkpointing."""


@dataclass
class Trace:
    """Bytes that a forward pass of some tokens keeps, and the arithmetic of its products."""

    tokens: int
    blocks: list[BlockTrace]
    outside: int
    """Kept outside the blocks: embeddings, positions, masks, the final norm."""
    casts: int
    """Copies of weights in 16 bits, which do not grow with the tokens."""
    working: int
    """The most that the backward pass of one block takes beyond what the block saved."""
    products: Products
    rough: bool = False
    """Whether the numbers follow a rule, since the model could not be run without its weights."""
    folded: list[int] = field(default_factory=list)
    """For each block, the weights that an adapter is added to before they compute, whatever the tokens."""
    spared_casts: int = 0
    """Of `casts`, what CPUs that cast a linear layer's weight at each use do without."""

    @property
    def plain(self) -> int:
        """Bytes kept without checkpointing."""
        return self.outside + sum(block.saved - min(block.spared, block.saved) for block in self.blocks)

    @property
    def inputs(self) -> int:
        """Bytes kept with checkpointing: the inputs of the blocks that keep something, and what lies outside them."""
        return self.outside + sum(block.input for block in self.blocks if block.saved)

    @property
    def recomputed(self) -> int:
        """Bytes that the largest block saves beyond its input, computed again."""
        return max((block.inner for block in self.blocks), default=0)

    def peak(self, checkpointing: bool) -> int:
        """The most bytes at one time, without the copies of weights."""
        return self.working + (self.inputs + self.recomputed if checkpointing else self.plain)


def extended(few: Trace, more: Trace, tokens: int) -> Trace:
    """The trace of `tokens` where what is kept grows by the token as from `few` to `more`."""
    times = (tokens - few.tokens) / (more.tokens - few.tokens)

    def at(low: float, high: float) -> int:
        return round(low + (high - low) * times)

    pairs = zip(few.blocks, more.blocks, strict=True)
    return Trace(
        tokens,
        [BlockTrace(*map(at, astuple(low), astuple(high))) for low, high in pairs],
        at(few.outside, more.outside),
        few.casts,
        at(few.working, more.working),
        Products(at(few.products.forward, more.products.forward), at(few.products.backward, more.products.backward)),
        folded=few.folded,
        spared_casts=few.spared_casts,
    )


def rough_trace(model: nn.Module, tokens: int, dtype: torch.dtype) -> Trace:
    """What a pass keeps by the shapes of the matrices of its blocks: for a model that does not run without weights."""
    width, parts, products, casts = dtype.itemsize, [], Products(), 0
    passed = False
    for block in blocks(model):
        matrices = [parameter for parameter in block.parameters() if parameter.ndim > 1]
        passed = passed or any(parameter.requires_grad for parameter in block.parameters())
        ends = sum(sum(matrix.shape[-2:]) for matrix in matrices)
        kept = round(_BEYOND_LAYERS * width * tokens * ends) if passed else 0
        hidden = width * tokens * min(matrices[0].shape)
        parts.append(BlockTrace(kept, hidden, kept))
        sizes = [matrix[0].numel() if matrix.ndim > 2 else matrix.numel() for matrix in matrices]
        products.forward += 2 * tokens * sum(sizes)
        trained = sum(size for size, matrix in zip(sizes, matrices, strict=True) if matrix.requires_grad)
        products.backward += 2 * tokens * (sum(sizes) * passed + trained)
        casts += 2 * sum(matrix.numel() for matrix in matrices if matrix.requires_grad) * (width < 4)
    return Trace(tokens, parts, parts[0].input, casts, max(part.inner for part in parts) // 3, products, rough=True)
