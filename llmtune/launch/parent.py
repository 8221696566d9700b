"""A training process ends when the command that started it is gone, however that ended."""

import os
import signal
import threading
import time

import psutil  # type: ignore[import-untyped]

PARENT = "LLMTUNE_PARENT"
"""The process id of the command that started a training."""
POLL, GRACE = 0.2, 60.0
"""Seconds between two looks, and how long a training may take to save and end."""


def follow_parent() -> None:
    """Watch the command that started this process; once it is gone, stop as after Ctrl-C, and at last at once.

    A process that was not started by llmtune is left alone.
    """
    if PARENT in os.environ:
        arguments = (int(os.environ[PARENT]), os.getppid())
        threading.Thread(target=_stop_without, args=arguments, daemon=True).start()


def _stop_without(command: int, parent: int) -> None:
    try:
        process: psutil.Process | None = psutil.Process(command)
    except psutil.NoSuchProcess:
        process = None
    # A launcher stands between the command and its processes; it may end alone.
    while process is not None and _lives(process) and os.getppid() == parent:
        time.sleep(POLL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
