"""The boundary to libraries: one line for whatever they raise, and an end for what never ends."""

import threading
import time

import pytest

from llmtune.errors import FieldError, MachineError, ProofError
from llmtune.model.reading import TooMuch, bounded, error_words, reading


class PanicException(BaseException):
    """What Rust code raises: no Exception."""


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (ValueError("a bad\nthing"), "a bad", 2),
        (KeyError("weight_map"), "KeyError: 'weight_map'", 2),
        (RuntimeError("\n\n  size\tmismatch \x1b[1m"), "RuntimeError: size mismatch [1m", 2),
        (ValueError("Wrong field 'x':\n    TypeError: no"), "Wrong field 'x': TypeError: no", 2),
        (RecursionError(), "RecursionError", 2),
        (PanicException("index out of range"), "PanicException: index out of range", 2),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "it is not text in UTF-8", 2),
        (ValueError("pass `trust_remote_code=True`"), "it needs code of its own, which llmtune never runs", 2),
        (ImportError("Using gptq needs the package optimum"), "Using gptq needs the package optimum", 3),
        (MemoryError(), "MemoryError", 3),
        (ValueError("long " * 200), ("long " * 200)[:240] + "...", 2),
    ],
)  # fmt: skip
def test_turns_every_error_into_one_line(error: BaseException, words: str, code: int) -> None:
    with pytest.raises(FieldError) as caught, reading("acme/x", "its tokenizer"):
        raise error
    assert str(caught.value) == f"model.base: acme/x: its tokenizer cannot be read: {words}"
    assert caught.value.exit_code == code
    assert caught.value.kind is MachineError if code == 3 else True


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ProofError("as it is")])
def test_lets_a_stop_and_an_own_error_through(error: BaseException) -> None:
    with pytest.raises(type(error)), reading("b", "x"):
        raise error


def test_stops_what_takes_too_long_even_in_code_that_catches_everything() -> None:
    began = time.monotonic()

    def work() -> None:
        with bounded(0.2, 1 << 30):
            try:
                time.sleep(30)
            except Exception:
                time.sleep(30)

    with pytest.raises(TooMuch, match=r"it takes over 0\.2 s"):
        work()
    assert time.monotonic() - began < 5


def test_stops_what_takes_too_much_memory_and_lifts_the_limit() -> None:
    with pytest.raises(MemoryError), bounded(5, 1 << 28):
        bytearray(1 << 29)
    assert len(bytearray(1 << 29)) == 1 << 29


def test_leaves_other_threads_alone() -> None:
    done: list[int] = []

    def work() -> None:
        with bounded(0.01, 1 << 20):
            time.sleep(0.1)
            done.append(len(bytearray(1 << 24)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1 << 24]


def test_says_no_more_than_an_error_without_text() -> None:
    assert error_words(OSError()) == "OSError"


def test_full_memory_is_no_fault_of_the_base() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"), reading("acme/x", "its weights"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
