"""What the check prints: a line a result, a summary at the end that repeats each failure, and all of it as JSON."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmtune.files import write_json

PASS, FAIL, SKIP, INFO = "PASS", "FAIL", "SKIP", ""


@dataclass(frozen=True)
class Line:
    """One result of one part: its verdict, its words, and the facts behind them."""

    part: str
    text: str
    status: str = INFO
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The line as it is printed: the part, the words, the verdict."""
        return " ".join(filter(None, (self.part, self.text, self.status)))


@dataclass
class Report:
    """The lines so far, printed as they come."""

    command: str
    lines: list[Line] = field(default_factory=list)
    print_line: Callable[[str], None] = lambda text: print(text, flush=True)
    began: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)
    """Card, versions, options: what is true of the whole run."""

    def add(self, line: Line) -> None:
        """Print a line and keep it."""
        self.lines.append(line)
        self.print_line(str(line))

    def count(self, status: str) -> int:
        """How many lines have a verdict."""
        return sum(line.status.split(" ")[0] == status for line in self.lines)

    def finish(self, file: Path | None) -> int:
        """Print the failures again and the summary, write the JSON file where one is named; gives the exit code."""
        seconds = time.monotonic() - self.began
        for line in [line for line in self.lines if line.status == FAIL]:
            self.print_line(str(line))
        counts = " ".join(f"{self.count(status)} {status}" for status in (PASS, FAIL, SKIP))
        self.print_line(f"{self.command}: {counts} in {seconds:.0f} s")
        if file is not None:
            lines = [asdict(line) for line in self.lines]
            write_json(file, {"command": self.command, "seconds": seconds, **self.facts, "lines": lines})
        return 1 if self.count(FAIL) or (self.count(SKIP) and not self.count(PASS)) else 0


def judged(part: str, text: str, passes: bool, **facts: Any) -> Line:
    """A line that passes or fails."""
    return Line(part, text, PASS if passes else FAIL, facts)


def undone(part: str, answer: dict[str, Any]) -> Line | None:
    """The line of an item that was skipped or failed; None where it was done."""
    if "skip" in answer:
        return Line(part, answer["name"], f"{SKIP} ({answer['skip']})", answer)
    if "error" in answer:
        return Line(part, f"{answer['name']}: {answer['error']}", FAIL, answer)
    return None
