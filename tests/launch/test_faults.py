"""Whatever ends a step is one line: a disk or memory that lacks, by name, and a fault of llmtune with its full text."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmtune import recipe
from llmtune.errors import FullMemoryError, LlmtuneError, MachineError, ProofError, RecipeError, TrainingError
from llmtune.files import ERROR_FILE
from llmtune.launch import ending
from llmtune.launch.ending import less_memory
from llmtune.launch.faults import VERBOSE, in_one_line, told_in_one_line
from llmtune.machine import device
from tests.support import runs, tiny
from tests.support.disks import WRAPPINGS, disk_error


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
@pytest.mark.parametrize("wrapped", WRAPPINGS)
def test_names_what_a_disk_lacks(tmp_path: Path, number: int, words: str, wrapped: str) -> None:
    file = tmp_path / "log.jsonl"
    place = str(file if wrapped in ("bare", "cause") else tmp_path)
    line = told(disk_error(number, file, wrapped), tmp_path)
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


CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 1 has a total capacity of 79.10 GiB of which 12.50 MiB is "
    "free. Including non-PyTorch memory, this process has 78.90 GiB memory in use.\nMore"
)
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate "


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError(CUDA), "out of memory on GPU 1: 21.5 GB was asked for, and 13.1 MB of 84.9 GB is free"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of memory on the GPU: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`, and "
            "1.0 GB is free",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
            "out of memory on the GPU: CUDA error: CUBLAS_STATUS_NOT",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory on the GPU: cuDNN error"),
        (RuntimeError("CUDA error: out of memory\nmore"), "out of memory on the GPU: CUDA error: out of memory, and"),
        (
            RuntimeError(f"{ALLOCATOR}8000000000000 bytes. Error code 12"),
            "out of memory: 8.0 TB was asked for; this ma",
        ),
        (
            MemoryError("Unable to allocate 7.45 GiB for an array"),
            "out of memory: 8.0 GB was asked for; this machine h",
        ),
        (MemoryError(), "out of memory: MemoryError; this machine has"),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            "out of memory: [Errno 12] Cannot allocate memory; this mach",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_full_memory_says_what_was_asked_what_is_free_and_what_lowers_it(
    tmp_path: Path, error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "run_device", lambda cpu=False: torch.device("cuda", 0))
    monkeypatch.setattr(device, "free_bytes", lambda device: 10**9)
    line = told(error, tmp_path)
    assert (line.exit_code, type(line)) == (3, FullMemoryError)
    assert str(line).startswith(words)
    assert str(line).endswith(f"; lower it by train.micro_batch_size: 1; {safe()}")
    assert "\n" not in str(line)


def test_full_memory_is_known_behind_the_error_of_a_library(tmp_path: Path) -> None:
    wrapped = RuntimeError("could not be converted")
    wrapped.__cause__ = torch.OutOfMemoryError(CUDA)
    assert str(told(wrapped, tmp_path)).startswith("out of memory on GPU 1: 21.5 GB was asked for")


def test_settings_that_lower_memory_come_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_file = tiny.write_recipe(tmp_path / "r.json", tmp_path, tmp_path / "rows.jsonl", runs.LORA)
    monkeypatch.setattr(ending, "count_gpus", lambda: 2)
    assert less_memory(recipe.load(recipe_file)) == (
        "lower it in a new run by train.activation_checkpointing: on, train.micro_batch_size: 1, a lower "
        "data.max_length (now 1024), model.precision: bf16, model.quantize: 4bit, train.optimizer: adamw_8bit, "
        "launch.accelerate: fsdp2"
    )
    done = ["train.activation_checkpointing=true", "train.micro_batch_size=1", "train.optimizer=adamw_8bit"]
    more = ["model.quantize=4bit", "model.precision=bf16", "launch.accelerate=fsdp2"]
    assert less_memory(recipe.load(recipe_file, done + more)) == (
        "lower it in a new run by a lower data.max_length (now 1024)"
    )


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
