"""What a training cost, in words: the general questions and texts, before and after."""

import math
from collections.abc import Mapping

from llmtune.evaluation.metrics import Difference, Score
from llmtune.evaluation.results import GENERAL_QUESTIONS, GENERAL_TEXTS, Result

CHANCE = 0.25
"""Every question has four ends."""


def forgetting_notes(
    base: Mapping[str, Result], tuned: Mapping[str, Result], gaps: Mapping[str, Mapping[str, Difference]]
) -> list[str]:
    """Say in a line each how general questions and texts fare before and after; no line where they were not asked."""
    lines = []
    for task, metric, title in (
        (GENERAL_QUESTIONS, "acc", "general questions"),
        (GENERAL_TEXTS, "loss", "loss on general texts (lower is better)"),
    ):
        if task not in base or task not in tuned:
            continue
        before, after = (results[task]["metrics"].get(metric) for results in (base, tuned))
        if before and after:
            gap = gaps.get(task, {}).get(metric)
            lines.append(f"{title} {_value(before)} -> {_value(after)}{_change(gap)}, n {after['n']}")
            if task == GENERAL_QUESTIONS and is_chance(before):
                lines.append("the base does not know these questions: only the texts count")
    return lines


def is_chance(score: Score) -> bool:
    """Tell whether guessing gives as many right answers, or more, in over 5% of cases."""
    if score["value"] is None:
        return True
    rows, right = score["n"], round(score["value"] * score["n"])
    tail = sum(math.comb(rows, k) * CHANCE**k * (1 - CHANCE) ** (rows - k) for k in range(right, rows + 1))
    return tail > 0.05


def _value(score: Score) -> str:
    return "not finite" if score["value"] is None else f"{score['value']:.2f}"


def _change(gap: Difference | None) -> str:
    if gap is None or gap["difference"] is None:
        return ""
    error = "" if gap["stderr"] is None else f" ± {gap['stderr']:.2f}"
    verdict = gap.get("verdict")
    return f" ({gap['difference']:+.2f}{error}{f': {verdict}' if verdict else ''})"
