"""The cells of the bench: the size of the model, the length of the rows and the arm, and which tools run on them."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.arms import ARMS

SIZES = ("135M", "361M", "1.07B")
TOOLS = ("llmtune", "trainer", "trainer-tuned", "trl", "trl-best", "llamafactory", "llamafactory-best")
TUNED = "-tuned", "-best"
"""How the names of tools end that get the allocator settings of llmtune's training process."""
_FROZEN = ("lora", "frozen", "frozen-3")


@dataclass(frozen=True)
class Work:
    """The rows of a step, and the steps of an epoch."""

    batch: int
    steps: int


WORK = {"80": Work(8, 16), "437": Work(4, 6), "947": Work(2, 6)}
"""What is trained in one epoch, by the mean tokens of a row."""
STEPS_OF_LARGE = 4
"""The steps of an epoch at most, of a model larger than the first."""


@dataclass(frozen=True)
class Cell:
    """What tools are compared on: the size of the model, the mean tokens of its rows, and the arm."""

    size: str
    rows: str
    arm: str

    @property
    def name(self) -> str:
        """The name by which `--only` chooses the cell."""
        return f"{self.size}/{self.rows}/{self.arm}"

    @property
    def work(self) -> Work:
        """The rows of its steps, and the steps of its epoch."""
        work = WORK[self.rows]
        return Work(work.batch, min(work.steps, STEPS_OF_LARGE)) if self.size in SIZES[1:] else work


@dataclass(frozen=True)
class Planned:
    """A run that the bench is to make; runs of equal `repeat` follow each other and are compared."""

    cell: Cell
    tool: str
    repeat: int


def _cells(size: str, rows: Sequence[str], arms: Sequence[str]) -> list[Cell]:
    return [Cell(size, length, arm) for length in rows for arm in arms]


FULL = (
    *_cells("135M", tuple(WORK), tuple(ARMS)),
    *_cells("361M", ("80", "437"), _FROZEN),
    *_cells("1.07B", ("80",), _FROZEN),
)
"""All cells. Full fine-tuning of 1.07B takes more memory than the machines have that this bench is made for."""
DEFAULT = (*_cells("135M", tuple(WORK), ("lora", "full", "frozen", "frozen-3")), *_cells("1.07B", ("80",), _FROZEN))
REPEATS = {"default": 1, "full": 3}


def choose_cells(
    name: str, only: Sequence[str], sizes: Sequence[str], rows: Sequence[str], arms: Sequence[str]
) -> list[Cell]:
    """The cells of a set, or of all those that have one of the named sizes, rows and arms, or are named themselves.

    Raises SystemExit for a name that no cell has, with the nearest.
    """
    cells = FULL if name == "full" or any((only, sizes, rows, arms)) else DEFAULT
    names = [cell.name for cell in cells]
    for unknown in set(only) - set(names):
        raise SystemExit(f"--only: no cell {unknown!r}; nearest: {difflib.get_close_matches(unknown, names, 1, 0)[0]}")
    wanted = ((sizes, "size"), (rows, "rows"), (arms, "arm"), (only, "name"))
    chosen = [cell for cell in cells if all(not some or getattr(cell, key) in some for some, key in wanted)]
    if not chosen:
        raise SystemExit(f"no cell has all of these; there are: {' '.join(names)}")
    return chosen


def tools_of(cell: Cell, name: str, tools: Sequence[str], llamafactory: bool) -> list[str]:
    """The tools that run on a cell: those that are named, else those of the set.

    The default set has Trainer without llmtune's allocator settings on LoRA alone, where it shows what they do, and
    LLaMA-Factory where all blocks train.
    """
    if tools:
        return [tool for tool in TOOLS if tool in tools]
    if name == "full":
        return [tool for tool in TOOLS if llamafactory or not tool.startswith("llamafactory")]
    plain = ["trainer"] if cell.arm == "lora" else []
    third = ["llamafactory-best"] if llamafactory and cell.arm in ("lora", "full") else []
    return ["llmtune", *plain, "trainer-tuned", *third]


def plan_runs(cells: Sequence[Cell], tools: dict[Cell, list[str]], repeats: int) -> list[Planned]:
    """All runs, interleaved: the tools of a cell follow each other, in the opposite order at every other repeat."""
    return [
        Planned(cell, tool, repeat)
        for repeat in range(repeats)
        for cell in cells
        for tool in (tools[cell] if repeat % 2 == 0 else reversed(tools[cell]))
    ]
