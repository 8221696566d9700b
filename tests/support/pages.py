"""Report pages as tests read them, and runs with a plan and a log of any shape."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from llmtune import recipe
from llmtune.files import write_json
from llmtune.plan.distances import Distances
from llmtune.plan.table import BaseName, CacheSize, PlanTable, StageRow
from llmtune.reporting.page import report
from llmtune.run import Run, create
from tests.support import ROOT, tiny

_VEGA = (ROOT / "llmtune/reporting/charts/vega/vega.min.js").read_text(encoding="utf-8")
VOID = {"meta", "col", "input"}


class Page(HTMLParser):
    """A parsed page: its elements with attributes, its table rows and its visible text; badly nested tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.styles, self.scripts, self.text = "", "", ""
        self.feed(text.replace(_VEGA, ""))  # two thirds of a megabyte that no test reads
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, {key: value or "" for key, value in attributes}))
        if name not in VOID:
            self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
        elif "script" in self.open:
            self.scripts += data
        elif "title" not in self.open:
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data

    def all(self, name: str, /, **attributes: str) -> list[dict[str, str]]:
        """The attributes of the elements of a name that have the given ones."""
        found = (given for element, given in self.elements if element == name)
        return [given for given in found if attributes.items() <= given.items()]


def page(run: Run) -> Page:
    """Write a run's page and parse it."""
    return Page(report(run).read_text(encoding="utf-8"))


def headings(text: str) -> list[str]:
    """The titles of a page's sections."""
    return re.findall(r"<h2>(.*?)</h2>", text.split("<script>")[0])


def empty(folder: Path, **sections: Any) -> Run:
    """A run that holds its recipe alone."""
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(3))
    return create(recipe.load(tiny.write_recipe(folder / "r.json", Path("me/base"), rows, **sections)), folder / "run")


def with_log(run: Run, stages: list[StageRow], records: list[dict[str, Any]], blocks: int = 2) -> Run:
    """The run with a plan of these stages and a log."""
    table = PlanTable(
        base=BaseName("me/base", None, None),
        method="full",
        adapter="none",
        blocks=blocks,
        parameters=1000,
        trained=100,
        adapted={},
        quantized=0,
        delta_bytes=400,
        states_bytes=16_000,
        frozen_blocks=CacheSize([], 0, 0),
        steps=stages[-1].end,
        stages=stages,
        notes=[],
    )
    write_json(run.plan_file, table.to_json())
    run.log_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def stage(start: int, end: int, trains: Distances, rates: dict[str, float]) -> StageRow:
    """A stage with one tensor of 50 parameters at each distance."""
    by_distance = {int(distance): value for distance, value in rates.items()}
    ones, fifties = dict.fromkeys(by_distance, 1), dict.fromkeys(by_distance, 50)
    return StageRow(start, end, 1.0, trains, max(rates.values()), 1.0, by_distance, ones, fifties)


def falling(rates: dict[str, float], steps: int = 40) -> list[dict[str, Any]]:
    """A log whose loss falls from 4 to 1, with a validation at every tenth step."""
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        facts = {"tokens": 100 * step, "seconds": 2.0 * step, "tokens_per_s": 50.0, "peak_memory_mb": 1000.0 + step}
        log.append({"step": step, "loss": 4 - 3 * (step - 1) / (steps - 1), "lr": rates, **facts})
        log += [{"step": step, "eval_loss": 5 - step / 10}] if step % 10 == 0 else []
    return log


def charted(run: Run, title: str) -> list[list[tuple[float, float]]]:
    """The lines of the chart in a section of a run's page, each as its points."""
    return drawn(report(run).read_text(encoding="utf-8").split(f"<h2>{title}</h2>")[1])


def drawn(markup: str) -> list[list[tuple[float, float]]]:
    """The lines of the first chart in some markup, each as its points."""
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', markup)[0])["data"]["lines"]
    assert data["columns"] == ["key", "line", "x", "y"]
    lines: dict[int, list[tuple[float, float]]] = {}
    for key, _, x, y in data["rows"]:
        lines.setdefault(key, []).append((x, y))
    return list(lines.values())
