"""Stored outputs that are read ahead of their use: the same values in any order, from buffers that never mix."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.frozen import check, reader
from llmtune.frozen.reader import SLOTS, OutputReader, keep_in_memory
from llmtune.frozen.store import StoredOutputs, longest_first, write_outputs
from tests.support.cached import GRADUAL, assert_equal, fit

LENGTHS = [5, 3, 8, 1, 6, 2, 7, 4, 9, 3]
BATCHES = [[0, 3], [8, 1, 2], [5], [4, 6], [9, 7], [3, 0, 2]]
CPU = torch.device("cpu")


@pytest.fixture
def stored(tmp_path: Path) -> StoredOutputs:
    """Outputs of ten rows, of random numbers."""
    torch.manual_seed(0)
    folder = tmp_path / "entry"
    with write_outputs(folder, {}, sum(LENGTHS) * 4 * 2) as writer:
        for row in longest_first(LENGTHS):
            writer.add(torch.randn(1, LENGTHS[row], 4).bfloat16(), [LENGTHS[row]])
    return StoredOutputs(folder, LENGTHS, 4, torch.bfloat16)


def plain(stored: StoredOutputs, rows: Sequence[int]) -> torch.Tensor:
    """What a plain read gives, padded to ten tokens."""
    return stored.read(rows, 10).clone()


def all_together(ahead: OutputReader) -> list[torch.Tensor]:
    """Every batch is expected before the first one is used."""
    for rows in BATCHES:
        ahead.expect(rows)
    return [ahead.fetch(rows, 10) for rows in BATCHES]


def one_ahead(ahead: OutputReader) -> list[torch.Tensor]:
    """A loader makes each batch while the one before is used."""
    ahead.expect(BATCHES[0])
    outputs = []
    for rows, following in zip(BATCHES, [*BATCHES[1:], []], strict=True):
        ahead.expect(following)
        outputs.append(ahead.fetch(rows, 10))
    return outputs


def in_parts(ahead: OutputReader) -> list[torch.Tensor]:
    """A batch is used in parts, its first row twice."""
    for rows in BATCHES:
        ahead.expect(rows)
    outputs = []
    for rows in BATCHES:
        ahead.fetch(rows[:1], 10)
        outputs.append(torch.cat([ahead.fetch([row], 10) for row in rows]))
    return outputs


def skipping(ahead: OutputReader) -> list[torch.Tensor]:
    """Batches are expected that nobody uses, and one is used that nobody expected."""
    for rows in ([1, 2], [4], [6, 7, 8], *BATCHES[:2], [5, 6], *BATCHES[2:4], *BATCHES[5:]):
        ahead.expect(rows)
    return [ahead.fetch(rows, 10).clone() for rows in BATCHES]


@pytest.mark.parametrize("use", [all_together, one_ahead, in_parts, skipping])
def test_gives_what_a_plain_read_gives(
    stored: StoredOutputs, use: Callable[[OutputReader], list[torch.Tensor]]
) -> None:
    outputs = use(OutputReader(stored, CPU, ahead=True))
    assert all(torch.equal(ours, plain(stored, rows)) for ours, rows in zip(outputs, BATCHES, strict=True))


def test_rows_in_memory_equal_those_on_disk(stored: StoredOutputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK", 100)  # several pieces, the largest of one row
    ahead, read = OutputReader(stored, CPU, ahead=True), list[int]()
    assert not ahead.keep_in_memory(stored.size - 1)
    assert ahead.keep_in_memory(stored.size, read.append)
    assert sum(read) == stored.size
    assert len(read) > 3
    expected = [plain(stored, rows) for rows in BATCHES]
    monkeypatch.setattr(stored, "read", lambda rows, tokens: pytest.fail("was read from the disk"))
    monkeypatch.setattr(stored, "read_packed", lambda rows, buffer: pytest.fail("was read from the disk"))
    assert all(torch.equal(ours, rows) for ours, rows in zip(all_together(ahead), expected, strict=True))


@pytest.mark.parametrize(("free", "kept"), [(4.0, True), (1.9, False)])
def test_keeps_in_memory_what_half_of_the_free_memory_holds(
    stored: StoredOutputs, free: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "free_bytes", lambda device: int(free * stored.size))
    ahead = OutputReader(stored, CPU, ahead=True)
    keep_in_memory([ahead])
    assert bool(ahead._kept) is kept


class Stream:
    """Stands in for a GPU's stream, and writes down what happens in order."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def __enter__(self) -> None:
        self._log.append("beside")

    def __exit__(self, *_: object) -> None:
        self._log.append("copied")

    def record_event(self) -> "Stream":
        return self

    def wait_event(self, event: "Stream") -> None:
        self._log.append("computing waits")

    def synchronize(self) -> None:
        self._log.append("thread waits for the copy")


def test_no_buffer_is_filled_while_it_is_copied(stored: StoredOutputs, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, log, buffers = OutputReader(stored, CPU, ahead=True), list[str](), list[int]()
    read = stored.read_packed

    def watched(rows: Sequence[int], buffer: torch.Tensor) -> None:
        log.append(f"read {rows}")
        buffers.append(buffer.data_ptr())
        read(rows, buffer)

    monkeypatch.setattr(stored, "read_packed", watched)
    monkeypatch.setattr(ahead, "_stream", Stream(log))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream(log))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("outlives the copy"))
    for rows in BATCHES[:4]:
        ahead.expect(rows)
    for slot in ahead._slots:
        assert slot.reading
        slot.reading.result()
    assert log == [f"read {rows}" for rows in BATCHES[:SLOTS]]
    assert len(set(buffers)) == SLOTS == 2
    log.clear()
    first = ahead.fetch(BATCHES[0], 10)
    assert ahead._slots[0].reading
    ahead._slots[0].reading.result()
    copy = ["beside", "copied", "computing waits", "outlives the copy"]
    assert log == [*copy, "thread waits for the copy", f"read {BATCHES[2]}"]
    assert torch.equal(first, plain(stored, BATCHES[0]))


def test_a_cut_file_ends_the_training(stored: StoredOutputs, tmp_path: Path) -> None:
    data = tmp_path / "entry" / "states.bin"
    data.write_bytes(data.read_bytes()[:-8])
    ahead = OutputReader(stored, CPU, ahead=True)
    ahead.expect([3])
    with pytest.raises(OSError, match="was cut while in use"):
        ahead.fetch([3], 10)


def trained(tmp_path: Path, **more: Any) -> Any:
    """A training in stages with cached outputs."""
    return fit(tmp_path, GRADUAL, gradient_accumulation_steps=2, per_device_train_batch_size=2, **more)


def test_training_on_rows_that_are_read_ahead_equals_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_fit = trained(tmp_path, keep=False)
    monkeypatch.setattr(reader, "reads_ahead", lambda device: True)
    monkeypatch.setattr(reader, "free_bytes", lambda device: 0)
    monkeypatch.setattr(check, "measure_seconds", lambda *_: (1.0, 2.0))
    direct = list[Sequence[int]]()
    read = StoredOutputs.read

    def watched(self: StoredOutputs, rows: Sequence[int], tokens: int) -> torch.Tensor:
        direct.append(rows)
        return read(self, rows, tokens)

    monkeypatch.setattr(StoredOutputs, "read", watched)
    ours = trained(tmp_path)
    assert "cached below block 2, 3" in ours[0]
    assert_equal(ours, plain_fit)
    assert len(direct) <= 28 / 2, "most of the 28 batches are read ahead"


def test_outputs_that_are_computed_faster_than_read_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "reads_ahead", lambda device: True)
    times = iter([0.0, 0.01, 5.0, 5.04, 9.0, 9.03, 11.0, 11.02])  # computing 10 ms and 30 ms, reading 40 ms and 20 ms
    monkeypatch.setattr(check.measure_seconds, "__defaults__", (lambda: next(times),))
    line = fit(tmp_path, GRADUAL)[0]
    assert "outputs of block 2 not used: reading a batch takes 40 ms and computing it 10 ms" in line
    assert "cached below block 3" in line
