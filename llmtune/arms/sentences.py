"""Who wins and why, in three sentences."""

from llmtune.arms.choice import Choice
from llmtune.arms.record import Comparison
from llmtune.arms.results import Result, titled
from llmtune.arms.scores import Gap
from llmtune.evaluation.metrics import format_difference, format_score
from llmtune.evaluation.tables import TITLES
from llmtune.numbers import duration, size

BASELINES = {
    "zero-shot": "the base without training",
    "few-shot": "the base with worked examples",
    "scratch": "the same model from random weights",
    "tf-idf": "a linear model over TF-IDF",
}


def metric_title(comparison: Comparison) -> str:
    """Name the metric that decides, for people."""
    return TITLES.get(comparison["metric"], comparison["metric"])


def no_winner(comparison: Comparison) -> list[str]:
    """Say why no arm wins."""
    reasons = [f"{titled(one['name'], one['size'])}: {one.get('reason', one['status'])}" for one in comparison["arms"]]
    return ["No arm has a score, so none wins.", *([f"{'; '.join(reasons)}."] if reasons else [])]


def three_sentences(comparison: Comparison, choice: Choice, against: dict[str, Gap]) -> list[str]:
    """Say who wins at which score, which arms come near, and what it costs beside what needs no training."""
    return [_first(comparison, choice), _second(choice), _third(choice, against)]


def _first(comparison: Comparison, choice: Choice) -> str:
    winner = choice.winner
    score, best = choice.means[winner.name], choice.ranked[0]
    seeds = f", mean of {score['seeds']} seeds" if score["seeds"] > 1 else ""
    rows = f"on {score['n']:,} held-out row{'s' * (score['n'] != 1)}{seeds}"
    said = f"{winner.name} wins: {metric_title(comparison)} {format_score(score['value'], score['stderr'])} {rows}"
    if winner is not best:
        top = choice.means[best.name]
        return (
            f"{said}, within one standard error of the best, {best.name} ({format_score(top['value'], top['stderr'])})."
        )
    if not choice.others:
        return f"{said}; it is the only arm that finished."
    return f"{said}, the best of {len(choice.ranked)} arms."


def _second(choice: Choice) -> str:
    """Say which arms cannot be told from the winner, with the rows that could, and which are worse."""
    if not choice.others:
        return "There is no other arm to compare it with."
    tied = [one for one in choice.others if choice.against(one).get("verdict") != "better"]
    worse = [one for one in choice.others if one not in tied]
    parts = []
    if tied:
        parts.append(f"No difference was measured to {_listed([_told(choice, one) for one in tied])}")
    if worse:
        named = _listed([f"{one.name} (by {_amount(choice.against(one))})" for one in worse])
        parts.append(f"{named} {'is' if len(worse) == 1 else 'are'} measurably worse")
    near = _listed([one.name for one in choice.near if one is not choice.winner])
    if choice.reason and near:
        parts.append(f"beside {near}, within one standard error, it {choice.reason}")
    return f"{'; '.join(parts)}."


def _told(choice: Choice, other: Result) -> str:
    """Name an arm that the data do not tell from the winner, with its distance and the rows that could."""
    gap = choice.against(other)
    return f"{other.name} ({_amount(gap)}; {rows_words(gap)})" if gap["n"] else f"{other.name} ({rows_words(gap)})"


def change_words(gap: Gap) -> str:
    """Format a difference with its sign and its error."""
    return format_difference({"difference": gap["difference"], "stderr": gap["stderr"], "n": gap["n"]})


def rows_words(gap: Gap) -> str:
    """Say how many rows show a difference of this size."""
    if gap["difference"] is None:
        return "no row was scored by both"
    if not gap["difference"]:
        return "their scores are equal"
    if gap["n"] < 2:
        return "one row cannot tell"
    rows = gap.get("could_tell")
    return f"about {_round(rows):,} rows could tell" if rows else "more seeds could tell, more rows could not"


def _round(rows: int) -> int:
    """Round to two digits: the number comes of a difference that is an estimate itself."""
    places = max(0, len(str(rows)) - 2)
    return round(rows, -places) if places else rows


def _amount(gap: Gap) -> str:
    """Say how far two arms lie apart, whichever is ahead."""
    value = gap["difference"]
    return format_score(None if value is None else abs(value), gap["stderr"])


def _apart(gap: Gap) -> str:
    """Say how far two lie apart that the data do not tell apart."""
    return f"apart by {_amount(gap)}" if gap["n"] else rows_words(gap)


def _third(choice: Choice, against: dict[str, Gap]) -> str:
    """Say what the winner costs, and how it stands to the best of what is no arm."""
    winner = choice.winner
    costs = [
        *([f"{duration(winner.seconds)} a training"] if winner.seconds is not None else []),
        *([f"{size(winner.peak_bytes)} of memory"] if winner.peak_bytes else []),
        *([f"a delta of {size(winner.delta_bytes)}"] if winner.delta_bytes else []),
    ]
    cost = f"It takes {_listed(costs)}" if costs else "Its cost was not measured"
    better = [name for name, gap in against.items() if gap.get("verdict") == "better"]
    if better:
        named = _listed([f"{BASELINES[name]} (by {_amount(against[name])})" for name in better])
        return f"{cost}; but {named} {'is' if len(better) == 1 else 'are'} measurably better than every arm."
    level = [name for name, gap in against.items() if gap.get("verdict") not in ("better", "worse")]
    if level:
        named = _listed([f"{BASELINES[name]} ({_apart(against[name])})" for name in level])
        return f"{cost}; no arm is measurably better than {named}."
    worse = _listed([f"{BASELINES[name]} (by {_amount(gap)})" for name, gap in against.items()])
    return f"{cost}; the best arm beats {worse}." if worse else f"{cost}; no baseline was measured."


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
