"""Where the names of marks stand on a chart, as pure functions of pixels: beside their marks, and never on each other.

A chart is placed at the width of a phone and drawn at any width. What is wider only moves marks apart, so names that
stand apart in the order of their marks stay apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LETTER, LINE, DOT = 6.5, 13.0, 6.0
"""Pixels of a letter, of a line of text, and from the middle of a mark to its edge."""
ASIDE, BESIDE = 8.0, 8.0
"""Pixels between a mark and its name, across and down, where nothing is in the way."""
LEADS = 16.0
"""Pixels above or below its mark from which on a name needs a line that leads to it."""
_OVER_DOT, _OVER_BAR, _OUTSIDE = 30.0, 4.0, 60.0
"""How many pixels farther from its mark a name may stand to be off another mark, off its bar, inside the chart."""


@dataclass(frozen=True)
class Mark:
    """A mark at a place, the ends of the bar through it, and its name, "" for none."""

    name: str
    x: float
    y: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Name:
    """The text that stands beside a mark, at which end it is aligned, and how far below the mark its middle is."""

    text: str
    align: Literal["left", "right"]
    down: float

    @property
    def leads(self) -> bool:
        """Whether a line leads from the mark to it."""
        return bool(self.text) and abs(self.down) > LEADS


@dataclass(frozen=True)
class _Box:
    """What a mark's name, dot or bar takes up; `at` is where the mark is, which moves with the width of the chart."""

    at: float
    start: float
    end: float
    top: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        """Whether the two overlap at this width or at a larger one."""
        first, last = (self, other) if self.at <= other.at else (other, self)
        apart = first.end <= last.start or (self.at == other.at and last.end <= first.start)
        return not apart and self.top < other.bottom and other.top < self.bottom


def place_names(marks: Sequence[Mark], width: float, height: float) -> list[Name]:
    """Return the name of each mark where it is nearest to its mark; one for which no place is free is empty."""
    dots = [_Box(one.x, one.x - DOT, one.x + DOT, one.y - DOT, one.y + DOT) for one in marks]
    bars = [_Box(one.x, one.x - 1, one.x + 1, one.top, one.bottom) for one in marks]
    placed: list[_Box] = []
    names = [Name("", "left", -BESIDE) for _ in marks]

    def cost(name: Name, box: _Box) -> float:
        outside = max(0.0, -box.start) + max(0.0, box.end - width)
        over = _OVER_DOT * sum(map(box.meets, dots)) + _OVER_BAR * sum(map(box.meets, bars))
        return abs(name.down) + over + (_OUTSIDE + outside) * (outside > 0)

    for index in sorted(range(len(marks)), key=lambda index: marks[index].y):
        places = [(name, _box(marks[index], name)) for name in _candidates(marks[index], width, height)]
        free = [one for one in places if not any(map(one[1].meets, placed))]
        if free:
            names[index], box = min(free, key=lambda one: cost(*one))
            placed.append(box)
    return names


def _candidates(mark: Mark, width: float, height: float) -> list[Name]:
    """Every place for a name, first on the side with more room; none for a mark without one."""
    sides: tuple[Literal["left", "right"], ...] = ("left", "right") if mark.x <= width / 2 else ("right", "left")
    lines = [way * (BESIDE + LINE * far) for far in range(int(height / LINE)) for way in (-1, 1)]
    inside = [down for down in lines if LINE / 2 <= mark.y + down <= height - LINE / 2]
    return [Name(mark.name, align, down) for down in inside for align in sides] if mark.name else []


def _box(mark: Mark, name: Name) -> _Box:
    wide, middle = LETTER * len(name.text), mark.y + name.down
    start = mark.x + ASIDE if name.align == "left" else mark.x - ASIDE - wide
    return _Box(mark.x, start, start + wide, middle - LINE / 2, middle + LINE / 2)
