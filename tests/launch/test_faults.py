"""Whatever ends a step is one line: a disk or memory that lacks, by name, and a fault of llmtune with its full text."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmtune.errors import LlmtuneError, MachineError, ProofError, RecipeError, TrainingError
from llmtune.files import ERROR_FILE
from llmtune.launch.faults import VERBOSE, in_one_line, told_in_one_line


def safe() -> str:
    return "training is safe up to step 3; continue with: llmtune run r"


def told(error: Exception, folder: Path, kind: type[LlmtuneError] = TrainingError) -> LlmtuneError:
    """What a step in a folder tells of an exception."""
    try:
        raise error
    except Exception as caught:
        return in_one_line(caught, kind, folder, safe, lambda: "lower it by train.micro_batch_size: 1")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space is left on the disk ("),
        (errno.EDQUOT, "the disk quota is used up ("),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "the disk reports an input/output error"),
        (errno.EMFILE, "too many files are open"),
        (errno.ENOENT, "no such file or folder"),
    ],
)
@pytest.mark.parametrize("wrapped", ["bare", "cause", "safetensors", "pyarrow"])
def test_names_what_a_disk_lacks(tmp_path: Path, number: int, words: str, wrapped: str) -> None:
    file = tmp_path / "log.jsonl"
    error: Exception = OSError(number, os.strerror(number), str(file))
    place = str(file)
    if wrapped == "cause":
        outer = RuntimeError("a save failed")
        outer.__cause__ = error
        error = outer
    elif wrapped != "bare":
        place = str(tmp_path)
        hidden = f"I/O error: {os.strerror(number)} (os error {number})"
        error = RuntimeError(f"Error while serializing: {hidden}")
        if wrapped == "pyarrow":
            error = OSError(f"[Errno {number}] Error writing bytes to file")
    line = told(error, tmp_path)
    assert (type(line), line.exit_code) == (MachineError, 3)
    assert str(line).startswith(f"{place}: {words}")
    assert str(line).endswith(f"; {safe()}")
    assert "\n" not in str(line)
    assert ("free" in str(line)) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_knows_how_safetensors_and_torch_tell_of_a_disk(tmp_path: Path) -> None:
    # Real errors of both libraries: a folder that is not there.
    with pytest.raises(Exception, match="os error 2") as caught:
        save_file({"a": torch.zeros(2)}, tmp_path / "none" / "a.safetensors")
    assert told(caught.value, tmp_path).exit_code == 3
    if Path("/dev/full").exists():
        with pytest.raises(RuntimeError) as written:
            torch.save({"a": torch.zeros(10_000_000)}, "/dev/full")
        line = told(written.value, tmp_path)
        assert line.exit_code == 3
        assert "a file could not be written (" in str(line)


def test_notes_of_a_disk_error_are_told(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    error.add_note("a checkpoint takes about 645 kB")
    assert f"free); a checkpoint takes about 645 kB; {safe()}" in str(told(error, tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_names_settings_that_lower_memory(tmp_path: Path, error: Exception) -> None:
    line = told(error, tmp_path)
    assert line.exit_code == 3
    assert str(line).startswith("out of memory: ")
    assert "this machine has" in str(line)
    assert str(line).endswith(f"; lower it by train.micro_batch_size: 1; {safe()}")
    assert "\n" not in str(line)


@pytest.mark.parametrize("kind", [LlmtuneError, TrainingError, ProofError])
def test_fault_is_one_line_of_its_kind_and_leaves_its_full_text(tmp_path: Path, kind: type[LlmtuneError]) -> None:
    line = told(TypeError("unsupported operand\nand more"), tmp_path, kind)
    assert line.exit_code == kind.exit_code
    assert str(line).startswith("a fault of llmtune, not of yours: TypeError: unsupported operand (test_faults.py:")
    assert f"the full text is in {tmp_path / ERROR_FILE}" in str(line)
    assert "\n" not in str(line)
    text = (tmp_path / ERROR_FILE).read_text()
    assert "Traceback (most recent call last)" in text
    assert "and more" in text
    assert "llmtune " in text.splitlines()[1]


def test_full_text_goes_to_a_temporary_file_where_there_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line = told(KeyError("x"), tmp_path / "none")
    file = next(tmp_path.glob("llmtune-error-*.txt"))
    assert str(file) in str(line)
    monkeypatch.setattr("tempfile.tempdir", str(file / "none-either"))
    assert "could not be written" in str(told(KeyError("x"), tmp_path / "none"))


def test_prints_the_full_text_when_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told(KeyError("x"), tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(VERBOSE, "1")
    told(KeyError("x"), tmp_path)
    assert "Traceback" in capsys.readouterr().err


def test_errors_for_users_pass_unchanged(tmp_path: Path) -> None:
    error = RecipeError("train.epochs: wrong")
    with pytest.raises(RecipeError) as caught, told_in_one_line(TrainingError, tmp_path):
        raise error
    assert caught.value is error
    with pytest.raises(KeyboardInterrupt), told_in_one_line(TrainingError, tmp_path):
        raise KeyboardInterrupt
