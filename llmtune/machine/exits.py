"""How a process ended, in words."""

import signal

from llmtune.machine.memory import machine_memory

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ending_signal(code: int) -> int:
    """The number of the signal that ended a process, 0 where none did; its code is 128 + that number, or minus it."""
    number = -code if code < 0 else code - 128
    return number if number in set(signal.Signals) else 0


def exit_words(code: int) -> str:
    """Say how a process ended, as `was stopped`, `was killed (signal 9), ...` or `ended with code 1`."""
    number = ending_signal(code)
    if number in STOPS:
        return "was stopped"
    if number == signal.SIGKILL:
        return f"was killed (signal 9), probably by the system for lack of memory: {machine_memory()}"
    return f"crashed (signal {number}, {signal.Signals(number).name})" if number else f"ended with code {code}"
