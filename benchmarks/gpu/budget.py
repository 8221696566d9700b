"""Time: the share of each part, and items that are done while their part has time left for one more."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARGIN = 1.2
"""How much longer than the longest item so far the next one may take."""

Item = tuple[str, Callable[[], dict[str, Any]]]
"""A name, and the function that gives its facts."""


@dataclass
class Budget:
    """The moment at which a part ends, by a monotonic clock that all processes share, and its longest item so far."""

    until: float
    longest: float = 0.0
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.until - self.clock()

    def fits(self, seconds: float = 0.0) -> bool:
        """Whether an item of so many seconds, or one like the longest so far, ends in time."""
        return max(seconds, self.longest * MARGIN) <= self.left


def ends(shares: Mapping[str, float], began: float, deadline: float) -> dict[str, float]:
    """The moment at which each part ends: what one part leaves, the next may use; shares scale to the deadline."""
    scale, passed, moments = deadline / sum(shares.values()), 0.0, {}
    for name, share in shares.items():
        passed += share
        moments[name] = began + passed * scale
    return moments


def do_items(
    items: Iterable[Item], budget: Budget, clean: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Do items while there is time; each gives its facts, what it failed with, or that it was skipped."""
    for name, work in items:
        if not budget.fits():
            yield {"name": name, "skip": "time"}
            continue
        began = budget.clock()
        try:
            facts = work()
        except Exception as error:
            facts = failure(error)
        finally:
            clean()
        seconds = budget.clock() - began
        budget.longest = max(budget.longest, seconds)
        yield {"name": name, "seconds": round(seconds, 3), **facts}


def failure(error: BaseException) -> dict[str, Any]:
    """An error in one line with the place in this project that it came from, and its whole traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _is_ours(frame.filename)] or list(frames)
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    words = (str(error).strip().splitlines() or [""])[0][:300]
    whole = "".join(traceback.format_exception(error))[-6000:]
    return {"error": f"{type(error).__name__}: {words}{place}", "traceback": whole}


def _is_ours(file: str) -> bool:
    return any(str(ROOT / folder) in file for folder in ("llmtune", "benchmarks")) and "site-packages" not in file
