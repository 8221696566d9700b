"""Compares the paths that use cached outputs with the full model, on a few rows."""

import torch
from torch.nn import functional

from llmtune.frozen.stand_in import StubbedDecoder
from llmtune.frozen.store import StoredOutputs, longest_first

CHECKED_ROWS = 3
FP32_ERROR, BF16_ERROR = 1e-6, 2**-7


def measure_errors(
    decoder: StubbedDecoder, outputs: dict[int, StoredOutputs], streamed: bool
) -> tuple[dict[int, float], float]:
    """The error of the cached path at each boundary, relative in the Euclidean norm, and the largest allowed error.

    Allowed is rounding, or twice the error that comes from running the same rows one by one.
    """
    if not outputs:
        return {}, 0.0
    order = longest_first(decoder.lengths)
    rows = sorted({order[at * (len(order) - 1) // max(1, CHECKED_ROWS - 1)] for at in range(CHECKED_ROWS)})
    decoder.stub()
    full = decoder.forward(rows)
    # Each pass through the full model reads all streamed blocks.
    single = rows[:1] if streamed else rows
    alone = [decoder.forward([row])[0] for row in single]
    padded = torch.stack([functional.pad(row, (0, 0, 0, full.shape[1] - len(row))) for row in alone])
    errors = {}
    for boundary, stored in outputs.items():
        decoder.stub(boundary)
        errors[boundary] = _error(decoder.forward(rows, stored), full)
    decoder.stub()
    return errors, max(FP32_ERROR if decoder.in_fp32 else BF16_ERROR, 2 * _error(padded, full[: len(single)]))


def _error(ours: torch.Tensor, full: torch.Tensor) -> float:
    return float((ours - full).norm() / full.norm())
