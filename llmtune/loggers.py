"""Keeps loggers of libraries quiet for a while: in a user's process they are then as loud as before."""

import contextlib
import logging
import threading
from collections.abc import Collection, Iterator

_LOCK = threading.RLock()
_LEVELS: dict[str, list[int]] = {}
"""Of each logger its own level, then those that blocks at work ask for: readers of rows end in any order."""


@contextlib.contextmanager
def quiet_loggers(names: Collection[str], level: int) -> Iterator[None]:
    """Let loggers tell nothing below a level inside the block; libraries that set their own are imported before."""
    with _LOCK:
        for name in names:
            logger, levels = logging.getLogger(name), _LEVELS.setdefault(name, [logging.NOTSET])
            levels[0] = levels[0] if len(levels) > 1 else logger.level
            levels.append(level)
            logger.setLevel(max(levels))
    try:
        yield
    finally:
        with _LOCK:
            for name in names:
                _LEVELS[name].remove(level)
                logging.getLogger(name).setLevel(max(_LEVELS[name]))
