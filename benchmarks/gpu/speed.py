"""`python -m benchmarks.gpu speed`: llmtune and other tools on the same rows in the same order, and memory."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.arms import Shape
from benchmarks.gpu.budget import ends
from benchmarks.gpu.comparison import contest, table
from benchmarks.gpu.correct import Check, machine, run_part
from benchmarks.gpu.report import FAIL, INFO, PASS, Line, undone

DEADLINE = 330.0
SHARES = {"E": 15, "llmtune": 70, "trl-best": 50, "peft": 45, "trl": 50, "unsloth": 10, "memory": 65, "drift": 25}
"""Seconds of each part."""


def run(check: Check, only: list[str], deadline: float = DEADLINE) -> None:
    """Run the tools one after the other, then the memory part, then the first tools again."""
    moments = ends(SHARES, check.report.began, deadline)
    if not only or "E" not in only:
        only = [*only, "E"] if only else list(SHARES)  # a share of the card's rate needs the rate
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for name in SHARES:
        if name in only:
            check.until = moments[name]
            run_part(name, _part(name, rows), check)
            if name == "E":
                check.report.print_line(f"{'':8} {table.header()}")
    check.report.facts |= {"rows": list(rows.values()), "model": model_of(check)}


def _part(name: str, rows: dict[tuple[str, str, str], dict[str, Any]]) -> Any:
    others = {"E": machine, "memory": memory, "drift": partial(drift, rows)}
    return others.get(name) or partial(contend, name, rows)


def model_of(check: Check) -> str:
    """The model that this card trains, by what was free on it at the start."""
    from benchmarks.gpu.runs.models import choose_model

    return check.model or choose_model(int(_machine(check).get("free", 0)))


def _machine(check: Check) -> dict[str, Any]:
    return dict(check.report.facts.get("machine", {}))


def shape_of(model: str) -> tuple[Shape, int]:
    """The sizes of a model for counting operations, and the width of its attention: heads times their size."""
    from benchmarks.gpu.runs.models import SHAPES

    sizes: dict[str, int] = SHAPES[model]
    hidden, width = sizes["hidden_size"], sizes["num_attention_heads"] * sizes["head_dim"]
    attention = 2 * hidden * width + 2 * hidden * sizes["num_key_value_heads"] * sizes["head_dim"]
    block = attention + 3 * hidden * sizes["intermediate_size"]
    return Shape(sizes["num_hidden_layers"], block, hidden * sizes["vocab_size"]), width


def start(check: Check, tool: str, runs: list[tuple[str, str]], name: str) -> Iterator[dict[str, Any]]:
    """Train runs with a tool in a process of its own; its answers."""
    model = model_of(check)
    size = contest.rows_a_pass(contest.BATCH[check.device], int(_machine(check).get("free", 0)), model)
    more: dict[str, Any] = {"tool": tool, "model": model, "runs": runs, "rows_a_pass": size, "again": name}
    return check.child(name, "comparison.tools:contend", **more).results()


def as_row(check: Check, answer: dict[str, Any], ours: dict[str, Any] | None) -> dict[str, Any]:
    """An answer as a row of the table."""
    shape, width = shape_of(model_of(check))
    arm = contest.make_arms(shape.blocks)[answer["arm"]]
    return table.row(answer, arm, shape, width, _machine(check), ours)


def contend(tool: str, rows: dict[tuple[str, str, str], dict[str, Any]], check: Check) -> Iterator[Line]:
    """One tool: a line a run, WRONG where its first losses are not llmtune's."""
    if "gemm_tflops" not in _machine(check):
        yield Line(tool, "the machine's rates are not known, see part E", FAIL)
        return
    for answer in start(check, tool, contest.runs_of(tool), tool):
        line = undone(tool, answer)
        if line is not None:
            yield line
            continue
        arm, kind = answer["arm"], answer["rows_kind"]
        beside = "full" if arm == "gradual" else arm
        ours = rows.get((beside, kind, "llmtune")) if tool != "llmtune" or arm == "gradual" else None
        row = as_row(check, answer, ours)
        row["wrong"] = row["wrong"] and tool != "llmtune"
        rows[arm, kind, tool] = row
        text = f"{'':{max(0, 7 - len(tool))}} {table.in_columns(row)}"
        if ours is None and tool != "llmtune":
            yield Line(tool, f"{text}  not compared: llmtune has no such row", INFO, row)
        else:
            yield Line(tool, f"{text}{' WRONG' if row['wrong'] else ''}", FAIL if row["wrong"] else PASS, row)


def memory(check: Check) -> Iterator[Line]:
    """Predicted, allocated and reserved memory of llmtune's own runs."""
    from benchmarks.gpu.parts.memory import cases_for

    cases = cases_for(model_of(check), check.folder)
    for answer in check.child("memory", "parts.memory:parts", cases=cases).results():
        yield undone("memory", answer) or Line("memory", answer["text"], answer["status"], answer)


def drift(rows: dict[tuple[str, str, str], dict[str, Any]], check: Check) -> Iterator[Line]:
    """LoRA on long rows once more with the first two tools: how far the card's speed moved meanwhile."""
    for tool in ("llmtune", "trl-best"):
        first = rows.get(("lora", "long", tool))
        if first is None:
            continue
        for answer in start(check, tool, [("lora", "long")], f"{tool}-again"):
            line = undone("drift", answer)
            if line is None:
                last = as_row(check, answer, None)["step_s"]
                line = Line("drift", table.drift(f"{tool} lora", first["step_s"], last), INFO, {"step_s": last})
            yield line
