"""The ways in which a process ends are told in the same words everywhere."""

import subprocess
import sys

import pytest

from llmtune.machine.exits import ending_signal, exit_words


@pytest.mark.parametrize(
    ("code", "number", "words"),
    [
        (1, 0, "ended with code 1"),
        (3, 0, "ended with code 3"),
        (255, 0, "ended with code 255"),
        (130, 2, "was stopped"),
        (-15, 15, "was stopped"),
        (137, 9, "was killed (signal 9), probably by the system for lack of memory: this machine has "),
        (-9, 9, "was killed (signal 9), probably by the system for lack of memory: this machine has "),
        (139, 11, "crashed (signal 11, SIGSEGV)"),
        (-6, 6, "crashed (signal 6, SIGABRT)"),
    ],
)
def test_says_how_a_process_ended(code: int, number: int, words: str) -> None:
    assert ending_signal(code) == number
    assert exit_words(code).startswith(words)


def test_takes_the_code_of_a_real_process() -> None:
    child = subprocess.run([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"])
    assert exit_words(child.returncode) == "crashed (signal 11, SIGSEGV)"
