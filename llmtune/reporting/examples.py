"""The report's examples: held-out rows with the answers of base and tuned model, to be filtered and searched."""

from dataclasses import dataclass

from llmtune.reporting.charts.chart import evenly
from llmtune.reporting.evaluations import Evaluations
from llmtune.reporting.html import Html, fold, free, join, section, tag
from llmtune.reporting.values import JSON, number, text

FIRST, SHOWN = 20, 100
"""So many rows stand open, and so many are on the page."""
PREVIEW_CHARACTERS, PREVIEW_LINES, MOST_CHARACTERS = 300, 4, 2000
FILTERS = ("tuned wrong", "both wrong", "only tuned right", "only base right", "both right")


@dataclass(frozen=True)
class Answer:
    """What one model answered, and whether that is right; None where nobody judged it."""

    model: str
    output: str
    right: bool | None


@dataclass(frozen=True)
class Example:
    """A held-out row, its true answer, and the answers of the base (asked in one way or two) and the tuned model."""

    id: str
    question: str
    truth: str
    of_base: list[Answer]
    of_tuned: Answer
    is_text: bool = False
    """Whether it is a plain text, which a model only reads."""

    @property
    def groups(self) -> list[str]:
        """The filters that show this row."""
        verdicts = [answer.right for answer in self.of_base if answer.right is not None]
        tuned, base = self.of_tuned.right, any(verdicts) if verdicts else None
        pair = {
            (False, False): "both wrong",
            (True, False): "only tuned right",
            (False, True): "only base right",
            (True, True): "both right",
        }.get((tuned, base))  # type: ignore[arg-type]
        return ["tuned wrong"] * (tuned is False) + ([pair] if pair else [])

    @property
    def difference(self) -> int:
        """How far base and tuned answers are apart: 2 where one alone is right, 1 where the words differ, 0 else."""
        if {"only tuned right", "only base right"} & set(self.groups):
            return 2
        return int(any(answer.output.strip() != self.of_tuned.output.strip() for answer in self.of_base))


def read_examples(evaluations: Evaluations) -> list[Example]:
    """Pair the answers to each held-out row by the row's id, or by its place where ids are not unique."""
    bases = [("base, zero-shot", _keyed(evaluations.base_rows))]
    bases.append((evaluations.few_shot_name, _keyed(evaluations.few_shot_rows)))
    return [
        Example(
            str(text(row.get("id")) or f"row {place}"),
            text(row.get("question")) or "",
            text(row.get("answer")) or "",
            [_answer(name, rows[key]) for name, rows in bases if key in rows],
            _answer("tuned", row),
            row.get("kind") == "text",
        )
        for place, (key, row) in enumerate(_keyed(evaluations.tuned_rows).items(), 1)
    ]


def _keyed(rows: list[JSON]) -> dict[object, JSON]:
    ids = [text(row.get("id")) for row in rows]
    unique = None not in ids and len(set(ids)) == len(ids)
    return dict(zip(ids if unique else range(len(rows)), rows, strict=True))


def _answer(model: str, row: JSON) -> Answer:
    if row.get("kind") == "text":
        loss = number(row.get("loss"))
        model = model.partition(",")[0]
        return Answer(model, "no finite loss" if loss is None else f"loss {loss:.3f} per token", None)
    right = row.get("exact_match")
    return Answer(model, text(row.get("output")) or "", right if isinstance(right, bool) else None)


def choose(examples: list[Example]) -> list[Example]:
    """Return at most SHOWN examples: first those that one model alone gets right, then other answers that differ.

    Of each kind those come first that the tuned model gets wrong. Of more than there is room for, evenly spaced ones
    are shown, and a fifth of the room is for answers that are alike.
    """
    wrong_first = sorted(examples, key=lambda one: one.of_tuned.right is not False)
    apart, other, alike = ([one for one in wrong_first if one.difference == level] for level in (2, 1, 0))
    room = SHOWN - min(len(alike), SHOWN // 5)
    shown = evenly(apart, room - min(len(other), room // 4))
    shown += evenly(other, room - len(shown))
    return shown + evenly(alike, SHOWN - len(shown))


def examples_section(evaluations: Evaluations | None) -> Html | None:
    """Show held-out rows with filters: question, true answer, and those of base and tuned; of a text the losses."""
    examples = read_examples(evaluations) if evaluations else []
    if not examples:
        return None
    shown = choose(examples)
    differ = sum(one.difference > 0 for one in examples)
    amount = f"All {len(examples):,}" if len(shown) == len(examples) else f"{len(shown)} of {len(examples):,}"
    order = f" The answers of base and tuned model differ on {differ:,}; those come first." if differ else ""
    cases = [_case(one) for one in shown]
    first, rest = (tag("div", *part, class_="cases") for part in (cases[:FIRST], cases[FIRST:]))
    more = fold(f"{len(cases) - FIRST} more rows", rest) if len(cases) > FIRST else None
    body = tag("div", *_filters(shown), first, more, class_="examples")
    return section("Held-out rows", body, note=f"{amount}.{order}")


def _filters(shown: list[Example]) -> list[Html]:
    """Radio buttons that work by style alone, and a search field that the page's script turns on."""
    counts = {name: sum(name in one.groups for one in shown) for name in FILTERS}
    buttons = [("all", len(shown)), *((name, count) for name, count in counts.items() if count)]
    parts = []
    for name, count in buttons if len(buttons) > 1 else []:
        checked = "checked" if name == "all" else None
        parts.append(tag("input", type="radio", name="show", id=_key("show", name), checked=checked))
        parts.append(tag("label", f"{name} ", tag("small", f"{count:,}"), for_=_key("show", name)))
    search = {"id": "search", "placeholder": "Search the rows", "aria_label": "Search the rows"}
    parts.append(tag("input", type="search", hidden="hidden", **search))
    return [*parts, tag("p", id="found", class_="quiet", role="status")]


def _key(prefix: str, name: str) -> str:
    return f"{prefix}-{name.replace(' ', '-')}"


def _case(example: Example) -> Html:
    head = tag("header", tag("small", example.id, class_="id"), _text(example.question))
    truth = [] if example.is_text else [Answer("true answer", example.truth, None)]
    answers = [*truth, *example.of_base, example.of_tuned]
    pairs = (
        tag("div", tag("dt", _title(one)), tag("dd", _text(one.output)), class_="truth" if one in truth else None)
        for one in answers
    )
    groups = " ".join(_key("in", name) for name in example.groups)
    return tag("article", head, tag("dl", *pairs), class_=f"case {groups}".strip())


def _title(answer: Answer) -> Html:
    marks = {True: tag("span", " ✓ right", class_="right"), False: tag("span", " ✗ wrong", class_="wrong")}
    return join(answer.model, marks.get(answer.right))  # type: ignore[arg-type]


def _text(whole: str) -> Html:
    """Show a text as large as it is; a long one as its start, which opens."""
    if not whole.strip():
        return tag("i", "only white space" if whole else "nothing", class_="quiet")
    preview = "\n".join(whole[:PREVIEW_CHARACTERS].split("\n")[:PREVIEW_LINES])
    if len(whole) - len(preview) < 60 and whole.count("\n") < PREVIEW_LINES + 2:
        return free(whole)
    left = len(whole) - MOST_CHARACTERS
    rest = tag("p", f"{left:,} more characters are not shown.", class_="note") if left > 0 else None
    summary = tag("summary", tag("span", f"{preview.rstrip()} ...", class_="text", dir="auto"))
    return tag("details", summary, free(whole[:MOST_CHARACTERS]), rest, class_="long")
