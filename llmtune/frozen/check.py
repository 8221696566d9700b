"""Compares the paths that use cached outputs with the full model, on a few rows."""

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from llmtune.frozen.reader import OutputReader
from llmtune.frozen.stand_in import StubbedDecoder
from llmtune.frozen.store import longest_first
from llmtune.machine import processes

CHECKED_ROWS = 3
FP32_ERROR, BF16_ERROR = 1e-6, 2**-7


def measure_errors(
    decoder: StubbedDecoder, outputs: dict[int, OutputReader], streamed: bool
) -> tuple[dict[int, float], float]:
    """The error of the cached path at each boundary, relative in the Euclidean norm, and the largest allowed error.

    Allowed is rounding, or twice the error that comes from running the same rows one by one, which is measured where
    rounding alone does not explain an error.
    """
    if not outputs:
        return {}, 0.0
    order = longest_first(decoder.lengths)
    rows = sorted({order[at * (len(order) - 1) // max(1, CHECKED_ROWS - 1)] for at in range(CHECKED_ROWS)})
    decoder.stub()
    full = decoder.forward(rows)
    errors = {}
    for boundary, stored in outputs.items():
        decoder.stub(boundary)
        errors[boundary] = _error(decoder.forward(rows, stored), full)
    decoder.stub()
    allowed = FP32_ERROR if decoder.in_fp32 else BF16_ERROR
    if not any(processes.gather(any(not error <= allowed for error in errors.values()))):
        return errors, allowed
    # Each pass through the full model reads all streamed blocks.
    single = rows[:1] if streamed else rows
    alone = [decoder.forward([row])[0] for row in single]
    padded = torch.stack([functional.pad(row, (0, 0, 0, full.shape[1] - len(row))) for row in alone])
    return errors, max(allowed, 2 * _error(padded, full[: len(single)]))


def measure_seconds(
    decoder: StubbedDecoder, boundary: int, stored: OutputReader, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds to read the outputs of one batch to the device, from the disk where they lie there, and to compute them.

    Of a sharded model, every process must ask.
    """
    rows = next(decoder.batches())
    decoder.stub(0, boundary)
    decoder.forward(rows)  # kernels are chosen and memory is reserved in a first pass
    computing = _timed(lambda: decoder.forward(rows), decoder.device, clock)
    decoder.stub()

    def read() -> None:
        stored.expect(rows)
        stored.fetch(rows, decoder.lengths[rows[0]])

    read()  # a buffer is reserved for the first one
    stored.forget_pages()
    return _timed(read, decoder.device, clock), computing


def find_slower(decoder: StubbedDecoder, outputs: dict[int, OutputReader]) -> dict[int, str]:
    """The boundaries whose outputs a GPU computes faster than it gets them, in the slowest process, each with a note.

    On CPUs nothing is read ahead, and nothing measured: reading a row never takes the time of a block there.
    """
    slower = {}
    for boundary, reader in outputs.items():
        if reader.ahead:
            times = processes.gather(measure_seconds(decoder, boundary, reader))
            reading, computing = max(read for read, _ in times), min(compute for _, compute in times)
            if reading > computing:
                words = f"reading a batch takes {reading * 1e3:.0f} ms and computing it {computing * 1e3:.0f} ms"
                slower[boundary] = f"outputs of block {boundary} not used: {words}"
    return slower


def _timed(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    _finish(device)
    begin = clock()
    work()
    _finish(device)
    return clock() - begin


def _finish(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.accelerator.synchronize(device)


def _error(ours: torch.Tensor, full: torch.Tensor) -> float:
    return float((ours - full).norm() / full.norm())
