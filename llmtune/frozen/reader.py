"""Brings stored outputs to the device of the model: read ahead of their use on a GPU, or kept in pinned memory."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from llmtune.frozen.store import StoredOutputs
from llmtune.machine import processes
from llmtune.machine.device import free_bytes
from llmtune.working import working

SLOTS = 2
"""Batches that are read ahead at a time; each has a buffer of its own."""
EXPECTED = 64
"""Batches that may wait to be read; of more, the last ones are read when they are used."""
CHUNK = 2**28
"""Bytes of one piece of pinned memory: torch rounds larger ones up to a power of two."""


def reads_ahead(device: torch.device) -> bool:
    """Whether rows are read before they are used: a GPU computes meanwhile, and a CPU's cores would share the work."""
    return device.type == "cuda"


@dataclass
class _Slot:
    """A buffer on the host with the rows of one batch, one after the other without padding."""

    buffer: torch.Tensor
    rows: dict[int, int] = field(default_factory=dict)
    """The first token of each row in the buffer."""
    unused: set[int] = field(default_factory=set)
    """The rows that were not fetched yet; the buffer may be used again once there are none."""
    reading: Future[None] | None = None
    copied: torch.Event | None = None
    """Passes on the device once the rows were copied from the buffer."""


class OutputReader:
    """Stored outputs (B, T, H) of any rows, on a device.

    With `ahead`, a thread reads the rows that are expected next, and on a GPU they are copied beside the computation.
    """

    def __init__(self, stored: StoredOutputs, device: torch.device, ahead: bool | None = None) -> None:
        self._stored, self._device = stored, device
        self.ahead = reads_ahead(device) if ahead is None else ahead
        self._pinned = device.type == "cuda"
        self._stream = torch.Stream(device) if device.type == "cuda" else None
        self._slots = [_Slot(self._allocate(0)) for _ in range(SLOTS)] if self.ahead else []
        self._expected: deque[tuple[int, ...]] = deque()
        self._thread = ThreadPoolExecutor(1, "read-ahead", self._choose_device) if self.ahead else None
        self._lock = threading.Lock()
        self._kept: dict[int, torch.Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self._stored.size

    def keep_in_memory(self, budget: int, step: Callable[[int], None] = lambda size: None) -> bool:
        """Read everything into (pinned) memory if it takes no more than `budget` bytes; `step` counts bytes."""
        if self._stored.size > budget:
            return False
        for rows in self._stored.chunks(CHUNK):
            chunk = self._allocate(sum(self._stored.lengths[row] for row in rows))
            self._stored.read_packed(rows, chunk)
            first = 0
            for row in rows:
                self._kept[row] = chunk[first : first + self._stored.lengths[row]]
                first += self._stored.lengths[row]
            step(chunk.numel() * chunk.element_size())
        return True

    def forget_pages(self) -> None:
        """Let the next read take the time of the disk, where the outputs lie there alone."""
        if not self._kept:
            self._stored.forget_pages()

    def expect(self, rows: Sequence[int]) -> None:
        """Read these rows, which are used next but for those that are expected already; any thread may ask."""
        with self._lock:
            if self.ahead and not self._kept and len(self._expected) < EXPECTED:
                self._expected.append(tuple(rows))
                self._read_next()

    def fetch(self, rows: Sequence[int], tokens: int) -> torch.Tensor:
        """Outputs (B, tokens, H) on the device, zeros on padding.

        What is not read ahead is valid until the next call, which uses the same memory.
        """
        with self._lock:
            slot = None if self._kept else self._slot_with(set(rows))
        if slot is None and not self._kept:
            return self._stored.read(rows, tokens).to(self._device)
        if slot and slot.reading:
            slot.reading.result()
        with self._beside():
            outputs = torch.zeros(len(rows), tokens, self._stored.width, dtype=self._stored.dtype, device=self._device)
            for index, row in enumerate(rows):
                content = self._kept[row] if slot is None else self._content(slot, row)
                outputs[index, : len(content)].copy_(content, non_blocking=True)
        copied = self._hand_over(outputs)
        if slot:
            with self._lock:
                slot.copied = copied
                slot.unused -= set(rows)
                self._read_next()
        return outputs

    def _content(self, slot: _Slot, row: int) -> torch.Tensor:
        first = slot.rows[row]
        return slot.buffer[first : first + self._stored.lengths[row]]

    def _slot_with(self, rows: set[int]) -> _Slot | None:
        """The slot that holds all these rows, None where none does; batches expected before it were skipped."""
        for place, expected in enumerate(self._expected):
            if any(rows <= slot.rows.keys() for slot in self._slots):
                break
            if rows <= set(expected):
                for _ in range(place):
                    self._expected.popleft()
                for slot in self._slots:
                    slot.unused.clear()
                self._read_next()
                break
        held = next((slot for slot in self._slots if rows <= slot.rows.keys()), None)
        if held:
            held.unused |= rows  # until they are copied
        return held

    def _read_next(self) -> None:
        """Give the expected batches to slots whose rows were all used."""
        for slot in self._slots:
            if self._expected and not slot.unused and self._thread:
                rows = self._expected.popleft()
                lengths = [self._stored.lengths[row] for row in rows]
                starts = [sum(lengths[:index]) for index in range(len(rows))]
                slot.rows, slot.unused = dict(zip(rows, starts, strict=True)), set(rows)
                slot.reading = self._thread.submit(self._fill, slot, list(rows), sum(lengths))

    def _choose_device(self) -> None:
        # Else the thread takes memory of the first GPU, which is another process's, to wait there for this one's.
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device)

    def _fill(self, slot: _Slot, rows: list[int], tokens: int) -> None:
        if slot.copied is not None:
            slot.copied.synchronize()
        if len(slot.buffer) < tokens:
            slot.buffer = self._allocate(tokens)
        self._stored.read_packed(rows, slot.buffer)

    def _allocate(self, tokens: int) -> torch.Tensor:
        return torch.empty(tokens, self._stored.width, dtype=self._stored.dtype, pin_memory=self._pinned)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Copy beside what the GPU computes."""
        if self._stream is None:
            yield
        else:
            with self._stream:
                yield

    def _hand_over(self, outputs: torch.Tensor) -> torch.Event | None:
        """Let what computes wait for the copies; gives the event that passes with the last one."""
        if self._stream is None:
            return None
        copied = self._stream.record_event()
        computing = torch.accelerator.current_stream(self._device)
        computing.wait_event(copied)
        outputs.record_stream(computing)  # its memory was allocated beside it, and is freed by it
        return copied


def keep_in_memory(readers: Sequence[OutputReader]) -> None:
    """Keep what is read ahead in pinned memory, the first reader's outputs first, as long as half of what is free does.

    The processes of a machine each take their part.
    """
    for reader in readers:
        budget = free_bytes(torch.device("cpu")) // 2 // processes.here()
        if reader.ahead and reader.size <= budget:
            with working("reading cached outputs into memory", reader.size, "bytes") as step:
                reader.keep_in_memory(budget, step)
