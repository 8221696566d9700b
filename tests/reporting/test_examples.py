"""Held-out rows on the page: small, wrong ones first, filtered by style alone, searchable, safe."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from llmtune.files import read_json, write_json
from llmtune.reporting.evaluations import Evaluations
from llmtune.reporting.examples import FILTERS, FIRST, SHOWN, Answer, Example, choose, examples_section
from llmtune.run import Run
from tests.support.pages import Page, page

STYLE = (Path(__file__).parents[2] / "llmtune" / "reporting" / "style.css").read_text()


def row(place: int, right: bool | None, **fields: Any) -> dict[str, Any]:
    """A stored answer."""
    texts = {"id": f"row-{place}", "question": f"question {place}", "answer": "yes", "output": "no"}
    return {**texts, "exact_match": right, **fields}


def evaluated(
    tuned: list[dict[str, Any]], base: list[dict[str, Any]], few: list[dict[str, Any]] | None = None
) -> Evaluations:
    """An evaluation that holds these answers alone."""
    return Evaluations({}, {}, {}, {}, base, few or [], tuned)


def section(*answers: list[dict[str, Any]]) -> Page:
    """The examples' part of a page."""
    return Page(examples_section(evaluated(*answers)) or "")


def rows_of(pairs: list[tuple[bool | None, bool | None]]) -> Page:
    """The examples of rows with these verdicts on tuned and base."""
    tuned = [row(place, verdict) for place, (verdict, _) in enumerate(pairs)]
    return section(tuned, [row(place, verdict) for place, (_, verdict) in enumerate(pairs)])


def test_rows_whose_answers_differ_come_first() -> None:
    found = rows_of([(True, True), (False, True), (True, False), (False, False)])
    assert re.findall(r"row-\d", found.text) == ["row-1", "row-2", "row-3", "row-0"]
    assert "All 4. The answers of base and tuned model differ on 2; those come first." in found.text


def test_filters_count_and_name_their_rows() -> None:
    found = rows_of([(True, True), (False, True), (True, False), (False, False), (None, None)])
    labels = re.findall(
        r'<label for="([\w-]+)">([\w ]+) <small>(\d+)',
        str(examples_section(evaluated([row(0, False)], [row(0, True)]))),
    )
    assert labels == [
        ("show-all", "all", "1"),
        ("show-tuned-wrong", "tuned wrong", "1"),
        ("show-only-base-right", "only base right", "1"),
    ]
    assert [article["class"] for article in found.all("article")] == [
        "case in-tuned-wrong in-only-base-right",
        "case in-only-tuned-right",
        "case in-tuned-wrong in-both-wrong",
        "case in-both-right",
        "case",
    ]
    assert [radio["id"] for radio in found.all("input", type="radio") if "checked" in radio] == ["show-all"]


def test_each_filter_works_by_style_alone() -> None:
    for key in (name.replace(" ", "-") for name in FILTERS):
        assert f".examples:has(#show-{key}:checked) .case:not(.in-{key})" in STYLE


def test_base_counts_as_right_if_one_of_its_answers_is() -> None:
    found = section([row(0, True)], [row(0, False)], [row(0, True)])
    assert [article["class"] for article in found.all("article")] == ["case in-both-right"]


def test_plain_texts_are_shown_with_their_losses() -> None:
    texts = [row(1, None, kind="text", question="Once upon", answer="", output="", loss=2.5)]
    shown = section([{**texts[0], "loss": 1.25}], texts).text
    assert re.search(r"Once upon\s*base\s*loss 2\.500 per token\s*tuned\s*loss 1\.250 per token", shown)
    assert "true answer" not in shown
    assert "no finite loss" in section([{**texts[0], "loss": None}], texts).text


def test_search_is_hidden_without_its_script() -> None:
    (search,) = rows_of([(True, True)]).all("input", type="search")
    assert "hidden" in search
    assert search["aria-label"] == "Search the rows"


def test_rows_without_verdicts_have_no_filter() -> None:
    found = rows_of([(None, None), (None, None)])
    assert not found.all("input", type="radio")
    assert "wrong" not in found.text


def test_answers_are_paired_by_id_not_by_place() -> None:
    tuned = [row(1, True, output="tuned one"), row(2, True, output="tuned two")]
    base = [row(2, False, output="base two"), row(1, False, output="base one")]
    found = section(tuned, base)
    assert [found.text.index(text) for text in ("tuned one", "tuned two")] == sorted(
        found.text.index(text) for text in ("tuned one", "tuned two")
    )
    assert found.text.index("base one") < found.text.index("tuned one") < found.text.index("base two")


def test_shows_a_part_of_many_rows_and_counts_the_rest() -> None:
    tuned = [row(place, place % 10 == 0) for place in range(5000)]
    found = section(tuned, tuned)
    assert len(found.all("article")) == SHOWN
    assert f"{SHOWN} of 5,000." in found.text
    assert f"{SHOWN - FIRST} more rows" in found.text
    assert "question 4990" in found.text


def test_rows_that_one_model_alone_gets_right_leave_room_for_others() -> None:
    def examples(levels: dict[str, int]) -> list[Example]:
        answers = {"apart": ("a", True, "b", False), "other": ("a", False, "b", False), "alike": ("a", True, "a", True)}
        return [
            Example(kind, "", "", [Answer("base", base, right)], Answer("tuned", tuned, ok))
            for kind, count in levels.items()
            for base, right, tuned, ok in [answers[kind]] * count
        ]

    for levels, kept in (
        ({"alike": 500, "other": 500, "apart": 500}, {"apart": 60, "other": 20, "alike": 20}),
        ({"alike": 500, "other": 3}, {"other": 3, "alike": 97}),
        ({"apart": 500}, {"apart": 100}),
    ):
        assert dict(Counter(one.id for one in choose(examples(levels)))) == kept


def test_examples_are_as_small_as_their_text() -> None:
    assert "max-height" not in STYLE
    found = section([row(0, True, output="short")], [row(0, True, output="word " * 2000)])
    assert len(found.all("details")) == 1
    assert "8,000 more characters are not shown." in found.text
    assert len(found.text) < 4000


def test_many_blank_lines_take_a_few_lines() -> None:
    markup = str(examples_section(evaluated([row(0, False, output="...\n\n" * 40)], [])))
    (preview,) = re.findall(r"<summary><span[^>]*>(.*?)</span>", markup, re.DOTALL)
    assert preview.count("\n") < 5
    assert markup.count("<details") == 1


def test_text_of_rows_runs_in_the_direction_of_its_script() -> None:
    found = section([row(0, True, question="كم الساعة؟", output="שלוש")], [])
    texts = found.all("div", **{"class": "text"})
    assert len(texts) >= 3
    assert all(text["dir"] == "auto" for text in texts)


def test_rows_cannot_end_a_script_or_an_attribute() -> None:
    evil = "</script><script>x()</script>\"'><b onclick=x()>"
    found = section([row(0, False, id=evil, question=evil, answer=evil, output=evil)], [])
    assert not found.all("script")
    assert not found.all("b")
    assert found.text.count(evil) == 4


def test_nothing_and_white_space_are_told_apart() -> None:
    found = section([row(0, False, output="")], [row(0, False, output=" \n")])
    assert "nothing" in found.text
    assert "only white space" in found.text


def test_page_shows_answers_and_verdicts_of_every_model(finished: Run) -> None:
    files = [finished.eval / f"{name}.json" for name in ("base", "tuned", "settings")]
    before = {file: file.read_bytes() for file in files}
    try:
        for name in ("base", "tuned"):
            stored = read_json(finished.eval / f"{name}.json")
            for key in {"rows", "few_shot_rows"} & set(stored):
                for place, one in enumerate(stored[key]):
                    one |= {"output": f"{name} {key} {one['id']}", "exact_match": place % 3 == 0}
            write_json(finished.eval / f"{name}.json", stored)
        finished.mark("eval", files)
        found = page(finished)
        for place in range(23):
            for output in ("base rows", "tuned rows", "base few_shot_rows"):
                assert f"{output} sum-{50 + place}" in found.text
        assert found.text.count("✓ right") == 3 * 8
        assert found.text.count("✗ wrong") == 3 * 15
    finally:
        for file, content in before.items():
            file.write_bytes(content)
        finished.mark("eval", files)
