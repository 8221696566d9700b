"""What the tools are compared on: the arms, the rows of each, and which steps of a run are timed."""

from typing import Any

from benchmarks.arms import LORA, Arm

STEPS = 15
"""Steps of a run: the first three warm up, ten are timed, and the last two are profiled."""
BATCH = {"cuda": 16, "cpu": 2}
"""Rows a step."""
TOOLS = ("llmtune", "trl-best", "peft", "trl", "unsloth")
RUNS = (
    ("lora", "long"),
    ("full", "long"),
    ("frozen8", "long"),
    ("qlora", "long"),
    ("lora", "short"),
    ("full", "short"),
    ("gradual", "long"),
)
"""Arm and rows of each run, the most telling first. Gradual is llmtune's alone, and stands beside full."""
PROFILED = ("lora", "full", "frozen8")


def make_arms(blocks: int) -> dict[str, Arm]:
    """The arms for a model of so many blocks; smaller ones than Llama-3.2-1B train fewer at the top."""
    top, middle = min(8, blocks // 2), min(4, blocks // 2)
    lora = {"kind": "full", "lr": 5e-4, "adapter": LORA}
    return {
        "lora": Arm(lora, lora=True),
        "full": Arm({"kind": "full", "lr": 1e-4}),
        "frozen8": Arm({"kind": "frozen", "reach": top, "lr": 5e-4}, 3, top=top),
        "qlora": Arm(lora, lora=True, quantize=True),
        "gradual": Arm({"kind": "gradual", "reaches": [0, middle, "all"], "lr": 1e-4}, 3),
    }


def runs_of(tool: str) -> list[tuple[str, str]]:
    """The runs of a tool."""
    return [run for run in RUNS if tool == "llmtune" or run[0] != "gradual"]


def steps_apart(arm: str, epochs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The steps of an arm that warm up, and those that are profiled: gradual warms up at each of its stages."""
    if arm == "gradual":
        return tuple(range(0, STEPS, STEPS // epochs)), ()
    return (0, 1, 2), (STEPS - 2, STEPS - 1) if arm in PROFILED else ()


def rows_an_epoch(arm: Arm, batch: int) -> int:
    """The rows of one epoch of an arm, in steps of `batch` rows."""
    return STEPS // arm.epochs * batch


def rows_a_pass(batch: int, free: int, model: str) -> int:
    """Rows that the other tools take in one pass: all on a card of 60 GB or more, else 4; llmtune decides itself."""
    return batch if model != "1b" or free >= 60 * 2**30 else min(batch, 4)


def facts_of(rows: list[dict[str, Any]], tokens: tuple[int, int, int]) -> dict[str, Any]:
    """What an epoch's rows come to."""
    return {"rows": len(rows), "tokens": tokens[0], "supervised": tokens[1], "squares": tokens[2]}
