"""Whatever another library raises in an evaluation is one line, with the exit code of what it means."""

import errno
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError, MachineError, ProofError, RecipeError
from llmtune.evaluation.boundary import failures_named, lacks_named
from tests.support.disks import WRAPPINGS, disk_error


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space is left on the disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "the disk reports an input/output error"),
    ],
)
@pytest.mark.parametrize("wrapped", WRAPPINGS)
def test_a_disk_that_lacks_something_is_no_failed_proof(tmp_path: Path, number: int, words: str, wrapped: str) -> None:
    file = tmp_path / "answers.jsonl"
    place = f"{file}: " if wrapped in ("bare", "cause") else ""
    with pytest.raises(MachineError) as raised, failures_named("x", "do this"):
        raise disk_error(number, file, wrapped)
    assert raised.value.exit_code == 3
    assert str(raised.value).startswith(f"x: {place}{words}")
    assert "\n" not in str(raised.value)


def test_a_file_that_a_task_names_and_that_is_not_there_is_its_fault(tmp_path: Path) -> None:
    with pytest.raises(ProofError, match=r"x: FileNotFoundError: .*none"), failures_named("x", "do this"):
        (tmp_path / "none").read_text()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ModuleNotFoundError("No module named 'antlr4'", name="antlr4"), MachineError, "needs the Python package antl"),
        (ConnectionError("refused"), MachineError, "x: the network cannot be reached: ConnectionError: refused"),
        (ConnectionRefusedError(111, "refused"), MachineError, "x: the network cannot be reached: ConnectionRefused"),
        (ZeroDivisionError(), ProofError, "x: ZeroDivisionError (in "),
        (ValueError("one\ntwo"), ProofError, "x: ValueError: one (in "),
        (RecipeError("as it is"), RecipeError, "as it is"),
    ],
)
def test_every_error_of_a_library_is_one_line(error: Exception, kind: type[LlmtuneError], message: str) -> None:
    with pytest.raises(kind) as raised, failures_named("x", "do this"):
        raise error
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("; do this") == (kind is ProofError)


def test_errors_that_lack_nothing_pass() -> None:
    with pytest.raises(ZeroDivisionError), lacks_named("x"):
        raise ZeroDivisionError
