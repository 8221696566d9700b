"""`python -m benchmarks.gpu correct`: does llmtune compute on this card what it computes on the CPU?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.budget import Budget, ends, failure
from benchmarks.gpu.children import Child, Task
from benchmarks.gpu.parts import environment
from benchmarks.gpu.parts.agreement import judge
from benchmarks.gpu.parts.two import compare_two, start_two
from benchmarks.gpu.report import FAIL, INFO, SKIP, Line, Report, undone
from llmtune.files import cache_folder

DEADLINE = 270.0
SHARES = {"E": 15, "A": 70, "Q": 25, "R": 50, "P": 30, "M": 25, "S": 15, "D": 20, "memory": 20}
"""Seconds of each part."""
LEAST = 5.0
"""Seconds that a part needs for its imports; part E, which others need, begins with any."""
ROOM_FOR_LARGE = 12 * 2**30
"""Free bytes of a card from which part P trains the top blocks of 1b."""


@dataclass
class Check:
    """What every part is given."""

    device: str
    folder: Path
    report: Report
    model: str | None
    """The model in place of mid and 1b, for a machine without a card."""
    until: float = 0.0

    def child(self, name: str, function: str, device: str | None = None, **arguments: Any) -> Child:
        """Start a process of this part; arguments that are names of variables (in capitals) go to its environment."""
        environment = {key: arguments.pop(key) for key in list(arguments) if key.isupper()}
        task = Task(function, device or self.device, self.folder, self.until, arguments)
        return Child(task, name, **environment)

    def size(self, name: str) -> str:
        """The model that a part is meant for, or the one that stands in for it."""
        return self.model or name


Part = Callable[[Check], Iterator[Line]]


def run(check: Check, only: list[str], deadline: float = DEADLINE) -> None:
    """Run the parts in order, each within its share; one that crashes fails alone."""
    moments = ends(SHARES, check.report.began, deadline)
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        check.until = moments[name]
        run_part(name, part, check)


def run_part(name: str, part: Part, check: Check) -> None:
    """Run a part where its share has time left, and turn what crashes it into a line."""
    if not Budget(check.until).fits(0 if name == "E" else LEAST):
        check.report.add(Line(name, "", f"{SKIP} (time)"))
        return
    try:
        for line in part(check):
            check.report.add(line)
    except Exception as error:
        facts = failure(error)
        check.report.add(Line(name, facts["error"], FAIL, facts))


def machine(check: Check) -> Iterator[Line]:
    """Part E: the machine and its rates."""
    for answer in check.child(
        "machine", "parts.environment:measure", disk=str(cache_folder() / ".gpu-check")
    ).results():
        line = undone("E", answer)
        if line is None:
            check.report.facts |= {"machine": answer}
        yield line or Line("E", environment.in_words(answer), INFO, answer)


def agreement(check: Check) -> Iterator[Line]:
    """Part A: the CPU and the device train the same cells at the same time."""
    base, rows = check.folder / "tiny", check.folder / "short.jsonl"
    make_tiny(base, rows)
    more = {"base": str(base), "rows": str(rows)}
    cpu = check.child("agreement-cpu", "parts.agreement:train_cells", "cpu", **more, runs="cpu")
    ours = check.child("agreement", "parts.agreement:train_cells", **more, runs="device")
    answers = [{answer["name"]: answer for answer in child.results()} for child in (ours, cpu)]
    for name in dict.fromkeys([*answers[0], *answers[1]]):
        missing = {"name": name, "skip": "no answer"}
        yield judge(name, *(answer.get(name, missing) for answer in answers))


def make_tiny(base: Path, rows: Path) -> None:
    """Write the tiny base and its rows, which most parts share, where they are not there."""
    import torch

    from benchmarks.gpu.runs.models import make_base
    from benchmarks.gpu.runs.rows import write_rows

    make_base(base, "tiny", "cpu", torch.float32)
    if not rows.exists():
        write_rows(rows, 48, "short")


def large_model(check: Check) -> str:
    """1b where the card has room for its top blocks' training, else mid."""
    free = check.report.facts.get("machine", {}).get("free", ROOM_FOR_LARGE)
    return check.size("1b" if free >= ROOM_FOR_LARGE else "mid")


def simple(part: str, function: str, name: str, check: Check, **arguments: Any) -> Iterator[Line]:
    """A part of one process on the device, whose results are lines already."""
    base, rows = check.folder / "tiny", check.folder / "short.jsonl"
    make_tiny(base, rows)
    more = {"base": str(base), "rows": str(rows), "mid": check.size("mid"), "large": large_model(check), **arguments}
    for answer in check.child(name, function, **more).results():
        yield undone(part, answer) or Line(part, answer["text"], answer["status"], answer)


def repetition(check: Check) -> Iterator[Line]:
    """Part R, twice: as it comes, and with deterministic algorithms."""
    yield from simple("R", "parts.repeat:as_it_comes", "repeat", check)
    workspace = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    yield from simple("R", "parts.repeat:deterministic", "repeat-deterministic", check, **workspace)


def two_processes(check: Check) -> Iterator[Line]:
    """Part D: two processes on the one card give what one gives."""
    base, rows = check.folder / "tiny", check.folder / "short.jsonl"
    make_tiny(base, rows)
    more = {"base": str(base), "rows": str(rows), "run": str(check.folder / "two")}
    prepared = list(check.child("two-alone", "parts.two:prepare_and_train_alone", **more).results())
    alone = next((answer for answer in prepared if "losses" in answer), None)
    if alone is None:
        yield from filter(None, (undone("D", answer) for answer in prepared))
        return
    children = start_two(check, more)
    answers = [list(child.results()) for child in children]
    yield compare_two(alone, answers)


PARTS: dict[str, Part] = {
    "E": machine,
    "A": agreement,
    "Q": partial(simple, "Q", "parts.quantized:parts", "quantized"),
    "R": repetition,
    "P": partial(simple, "P", "parts.kept:parts", "kept"),
    "M": partial(simple, "M", "parts.merges:parts", "merges"),
    "S": partial(simple, "S", "parts.reads:parts", "reads"),
    "D": two_processes,
    "memory": partial(simple, "memory", "parts.memory:parts", "memory"),
}
