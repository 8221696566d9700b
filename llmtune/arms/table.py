"""The table of a comparison: a row an arm and a baseline, those that failed or were skipped with their reason."""

from collections.abc import Sequence
from typing import cast

from llmtune.arms.record import ArmRecord, Baseline, Comparison
from llmtune.arms.results import general, titled
from llmtune.arms.sentences import change_words, metric_title, rows_words
from llmtune.arms.verdict import Numbers, Verdict
from llmtune.evaluation.metrics import format_score
from llmtune.numbers import duration, rate, size

Cells = dict[str, str]
"""A row's cells by column title."""
LEFT = {"arm", "verdict", "cost of training"}
"""Columns of words; others are aligned at the right."""
_Key = tuple[str, float, bool]
"""Name and size, and whether it is an arm."""
_THAN = {"better": "every arm", "worse": "the best arm"}
"""What a baseline is better or worse than: it was compared with the best arm."""


def table(comparison: Comparison, verdict: Verdict) -> list[Cells]:
    """Return the rows of a comparison, best first, then baselines, then what was not compared.

    A column that no row fills is left out.
    """
    score = metric_title(comparison)
    records: dict[_Key, ArmRecord | Baseline] = {_key(one, True): one for one in comparison["arms"]}
    records |= {_key(one, False): one for one in comparison["baselines"]}
    known = {_key(one, one["is_arm"]): one for one in verdict["results"]}
    rows = [_measured(one, _trained(records.get(key)), score, verdict) for key, one in known.items()]
    rows += [_missing(one) for key, one in records.items() if key not in known]
    return _filled(rows)


def _key(one: ArmRecord | Baseline | Numbers, is_arm: bool) -> _Key:
    return one["name"], one["size"], is_arm


def _trained(one: ArmRecord | Baseline | None) -> ArmRecord | None:
    """The arm of a row: its own record, that of a baseline which trains, or none."""
    if one is None:
        return None
    return cast(ArmRecord, one) if "set" in one else one.get("arm")


def _measured(one: Numbers, record: ArmRecord | None, score: str, verdict: Verdict) -> Cells:
    return {
        "arm": titled(one["name"], one["size"]),
        "rate": rates_words(record.get("lr")) if record else "",
        score: format_score(one["score"]["value"], one["score"]["stderr"]),
        "loss": format_score(one["loss"]["value"], one["loss"]["stderr"]) if one["loss"] else "",
        "minutes": _minutes(one, record),
        "peak memory": _memory(one, record),
        "delta": size(one["delta_bytes"]) if one["delta_bytes"] else "",
        "to 90%": duration(one["seconds_to_90"]) if one["seconds_to_90"] is not None else "",
        "cost of training": cost_words(record),
        "verdict": verdict_words(one, verdict),
    }


def _minutes(one: Numbers, record: ArmRecord | None) -> str:
    """The time of one training, and of everything that the arm took."""
    if one["seconds"] is None:
        return ""
    everything = record.get("minutes") if record else None
    total = f" of {duration(60 * everything)}" if everything is not None else ""
    return f"{duration(one['seconds'])}{total}"


def _memory(one: Numbers, record: ArmRecord | None) -> str:
    """The measured peak, and what was predicted."""
    predicted = record.get("predicted", {}).get("bytes") if record else None
    told = f" (predicted {size(predicted)})" if predicted else ""
    return f"{size(one['peak_bytes'])}{told}" if one["peak_bytes"] else told.strip(" ()")


def rates_words(lr: float | Sequence[float] | None) -> str:
    """Format the rate that a search chose, one a stage where there are several."""
    if lr is None:
        return ""
    return ", ".join(map(rate, lr)) if isinstance(lr, Sequence) else rate(lr)


def cost_words(record: ArmRecord | None) -> str:
    """Say what the training cost on general questions and texts, tuned minus base."""
    known = general(record.get("seeds", [])) if record else {}
    return ", ".join(f"{_what(name)} {value:+.2f}" for name, value in known.items())


def _what(name: str) -> str:
    """Name what was asked without its metric: questions for general_questions.acc."""
    return name.partition(".")[0].removeprefix("general_")


def verdict_words(one: Numbers, verdict: Verdict) -> str:
    """Say how an arm stands to the winner, and a baseline to the best arm."""
    if one["is_arm"] and (one["name"], one["size"]) == (verdict["winner"], verdict.get("size")):
        return "wins"
    gap = one.get("gap")
    if gap is None:
        return ""
    words, change = gap.get("verdict", ""), change_words(gap)
    if words in _THAN:
        return f"{words} than {'the winner' if one['is_arm'] else _THAN[words]}: {change}"
    if gap["difference"] is None:
        return f"{words}: {rows_words(gap)}"
    told = f"; {rows_words(gap)}" if gap.get("could_tell") or gap["difference"] == 0 else ""
    return f"{words}: {change}{told}"


def _missing(one: ArmRecord | Baseline) -> Cells:
    """A row for what was not compared, with its reason."""
    reason = one.get("reason")
    words = one["status"] if one["status"] != "done" else "not measured"
    return {"arm": titled(one["name"], one["size"]), "verdict": f"{words}: {reason}" if reason else words}


def _filled(rows: list[Cells]) -> list[Cells]:
    """Give every row every column that one of them fills."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    kept = [title for title in titles if any(row.get(title) for row in rows)]
    return [{title: row.get(title, "") for title in kept} for row in rows]
