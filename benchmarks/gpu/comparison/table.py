"""The arithmetic and the form of the speed table: seconds a step, the share of the card's rate, and what is WRONG."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.arms import Arm, Shape, operations

TOLERANCE, COMPARED = 2e-2, 3
"""How far the first losses of a tool may be from llmtune's, and how many are compared."""
COLUMNS = (
    ("arm", 8), ("rows", 5), ("tool", 9), ("s/step", 8), ("±", 7), ("tokens/s", 9), ("x llmtune", 9), ("peak GB", 8),
    ("reserved", 8), ("MFU", 5), ("of spec", 7), ("busy", 5), ("first step s", 12), ("loss[0..2]", 0),
)  # fmt: skip
GB = 2**30


def attention_operations(arm: Arm, blocks: int, width: int, squares: int) -> float:
    """FLOPs of causal attention itself for all epochs; `squares` is the sum of squared lengths of an epoch's rows.

    A row of T tokens costs 2 T^2 x width forward in a block, which is half of two full products, and twice that back.
    """
    return operations(replace(arm, lora=False), Shape(blocks, 1, 0), squares * width, 0)


def needed_operations(arm: Arm, shape: Shape, width: int, facts: dict[str, Any]) -> float:
    """FLOPs that all epochs of an arm need: matrices and attention, without adapters and norms."""
    matrices = operations(arm, shape, facts["tokens"], facts["supervised"])
    return matrices + attention_operations(arm, shape.blocks, width, facts["squares"])


def seconds_a_step(facts: dict[str, Any], epochs: int) -> float:
    """The median step; over several epochs their mean, and with it what was built before the first step."""
    if epochs == 1:
        return statistics.median(facts["timed_s"])
    return statistics.fmean(facts["timed_s"]) + facts["setup_s"] / len(facts["steps_s"])


def row(
    facts: dict[str, Any], arm: Arm, shape: Shape, width: int, rates: dict[str, Any], ours: dict[str, Any] | None
) -> dict[str, Any]:
    """One run as a row of the table; `ours` is llmtune's row of the same arm and rows, which it is compared with."""
    step, steps = seconds_a_step(facts, arm.epochs), len(facts["steps_s"])
    rate = needed_operations(arm, shape, width, facts) / steps / step / 1e12
    spec = rates.get("peak_tflops")
    return {
        **{key: facts.get(key) for key in ("arm", "rows_kind", "tool", "note", "losses", "allocated", "reserved")},
        **{key: facts.get(key) for key in ("busy", "first_step_s", "setup_s", "timed_s")},
        "step_s": step,
        "spread_s": max(facts["timed_s"]) - min(facts["timed_s"]),
        "tokens_s": facts["tokens"] * arm.epochs / steps / step,
        "times": None if ours is None else step / ours["step_s"],
        "mfu": rate / rates["gemm_tflops"],
        "mfu_spec": rate / spec if spec else None,
        "wrong": ours is not None and differs(facts["losses"], ours["losses"]),
    }


def differs(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    """Whether the first losses of two tools are over 2e-2 apart, or there are too few of them to tell."""
    pairs = list(zip(theirs[:COMPARED], ours[:COMPARED], strict=False))
    return len(pairs) < COMPARED or not all(abs(one - other) <= TOLERANCE for one, other in pairs)


def header() -> str:
    """The names of the columns."""
    return " ".join(name.ljust(width) for name, width in COLUMNS).rstrip()


def in_columns(row: dict[str, Any]) -> str:
    """A row under the header."""
    losses = " ".join(f"{loss:.3f}" for loss in row["losses"][:COMPARED])
    values = (
        row["arm"], row["rows_kind"], row["tool"], _shown(row["step_s"], ".4f"), _shown(row["spread_s"], ".4f"),
        _shown(row["tokens_s"], ",.0f"), _shown(row["times"], ".2f"), _gigabytes(row["allocated"]),
        _gigabytes(row["reserved"]), _shown(row["mfu"], ".2f"), _shown(row["mfu_spec"], ".2f"),
        _shown(row["busy"], ".2f"), _shown(row["first_step_s"], ".2f"), losses,
    )  # fmt: skip
    text = " ".join(value.ljust(width) for value, (_, width) in zip(values, COLUMNS, strict=True)).rstrip()
    return text + (f"  {row['note']}" if row["note"] else "")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / GB:.2f}"


def drift(name: str, first: float, last: float) -> str:
    """How far the same run at the end is from the one at the beginning."""
    return f"{name} {first:.4f} -> {last:.4f} s a step ({last / first - 1:+.1%})"
