"""Names of arms on a chart: every arm has one, none lies on another, and one that is moved is led to."""

import json
import random
import re
from itertools import combinations
from typing import Any

import pytest

from llmtune.reporting.charts.dots import Dot
from llmtune.reporting.comparison.charts import against

NAMES = ["lora", "full", "gradual", "frozen", "discriminative", "qlora", "bottleneck", "scratch"]
HEIGHT, PADDING = 300, {"x": 40, "y": 24}
WIDTHS = (260, 420, 900)
"""Pixels of a chart on a phone, a tablet and a desktop."""
Place = tuple[float, float]


def placements(count: int) -> list[list[Place]]:
    """Arms at one place, in a row, on a line upward, in close groups and anywhere."""
    draw = random.Random(count)
    near: list[Place] = [(100 + draw.gauss(0, 1), 0.8 + draw.gauss(0, 0.002)) for _ in range(count - 1)]
    return [
        [(100.0, 0.8)] * count,
        [(100.0 + place, 0.8) for place in range(count)],
        [(100.0, 0.8 + place / 1000) for place in range(count)],
        [*near, (100.0, 0.3)],
        [*near, (900.0, 0.8)],
        *[[(draw.uniform(50, 500), draw.random()) for _ in range(count)] for _ in range(20)],
    ]


def drawn(places: list[Place], error: float | None) -> dict[str, list[dict[str, Any]]]:
    """The rows of a chart of arms at these places, by the names of its data."""
    arms = [Dot(name, x, y, error) for name, (x, y) in zip(NAMES, places, strict=False)]
    content = re.search(r'<script type="application/json">(.*?)</script>', str(against(arms, "seconds", "score")))
    assert content
    data = json.loads(content[1])["data"]
    return {name: [dict(zip(one["columns"], row, strict=True)) for row in one["rows"]] for name, one in data.items()}


def boxes(rows: list[dict[str, Any]], width: int) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of each name on a chart of a width, in pixels."""
    xs, ys = [row["x"] for row in rows], [row[end] for row in rows for end in ("low", "high")]

    def pixel(value: float, values: list[float], size: int, padding: int) -> float:
        low, high = min(values), max(values)
        return padding + (size - 2 * padding) * (value - low) / (high - low) if high > low else size / 2

    found = []
    for row in rows:
        x = pixel(row["x"], xs, width, PADDING["x"])
        middle = HEIGHT - pixel(row["y"], ys, HEIGHT, PADDING["y"]) + row["down"]
        letters = 6.4 * len(row["label"])
        start = x + 8 if row["align"] == "left" else x - 8 - letters
        found.append((start, middle - 6, start + letters, middle + 6))
    return found


@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("error", [None, 0.02], ids=["plain", "errors"])
def test_names_of_close_arms_never_overlap_at_any_width(count: int, error: float | None) -> None:
    for places in placements(count):
        rows = drawn(places, error)["dots"]
        assert [row["label"] for row in rows] == NAMES[:count]
        for width in WIDTHS:
            for one, other in combinations(boxes(rows, width), 2):
                apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
                assert apart, (places, width)


def test_a_line_leads_to_a_name_that_stands_far_from_its_mark() -> None:
    data = drawn([(100.0, 0.8)] * 8, 0.02)
    moved = [row for row in data["dots"] if abs(row["down"]) > 16]
    assert data["led"] == moved
    assert 0 < len(moved) < 8
    assert drawn([(100.0, 0.8), (200.0, 0.5)], 0.02)["led"] == []
