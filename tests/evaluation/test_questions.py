"""Held-out rows and the model's context: what does not fit is known at check, and said."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe
from llmtune.data.encoding.rules import Rules
from llmtune.data.row import Row
from llmtune.errors import RecipeError
from llmtune.evaluation.questions import Survey, answer_room, few_shot_questions, fitting_shots, questions
from llmtune.training.prepare import examine
from tests.support import tiny

CONTEXT = 512
RULES = Rules(CONTEXT, "drop", "last_answer")


def rows_of(sizes: list[int], start: int = 0) -> list[Row]:
    """Rows of questions of these sizes in characters, which are tokens; the template adds 26."""
    return [
        Row(f"r{n}", ({"role": "user", "content": "q" * size}, {"role": "assistant", "content": "abc"}), f"t:{n}")
        for n, size in enumerate(sizes, start)
    ]


@pytest.mark.parametrize(
    ("size", "kept", "words"),
    [
        (20, 5, None),
        (100, 3, "few-shot: 3 worked examples, not 5: more do not fit into the model's context of 512 tokens"),
        (200, 1, "few-shot: 1 worked examples, not 5"),
        (300, 0, "few-shot is left out: no worked example fits into the model's context of 512 tokens"),
    ],
)
def test_uses_as_many_worked_examples_as_fit(size: int, kept: int, words: str | None) -> None:
    tokenizer = tiny.tokenizer()
    zero_shot = questions(rows_of([size, 5]), [], None, tokenizer, {2}, RULES)
    survey = Survey().add(zero_shot)
    shots, notes = fitting_shots(rows_of([size] * 5, 10), survey, tokenizer, RULES)
    assert len(shots) == kept
    assert [words in note for note in notes if words] == [True] * bool(words)
    few_shot = few_shot_questions(zero_shot, shots, tokenizer, {2}, RULES)
    assert len(few_shot.examples) == 2
    assert max(map(len, few_shot.prompt_ids)) + answer_room(survey, CONTEXT) <= CONTEXT
    assert few_shot.shots == [row.id for row in shots]


def test_the_longest_worked_example_goes_first() -> None:
    tokenizer = tiny.tokenizer()
    zero_shot = questions(rows_of([50]), [], None, tokenizer, {2}, RULES)
    shots, _ = fitting_shots(rows_of([50, 400, 60], 10), Survey().add(zero_shot), tokenizer, RULES)
    assert [row.id for row in shots] == ["r10", "r12"]


def test_rows_longer_than_the_context_are_not_asked() -> None:
    asked = questions(rows_of([50, 600, 70, 480]), [], None, tiny.tokenizer(), {2}, RULES)
    assert (asked.not_asked, [row.id for row in asked.rows], asked.of) == (["r1"], ["r0", "r2", "r3"], 4)
    assert [example.id for example in asked.examples] == ["r0", "r2", "r3"]


def check(folder: Path, test: list[dict[str, Any]], suite: str = "quick", template: str | None = None) -> list[str]:
    """The notes of a check with these test rows."""
    base = tiny.save_base(folder / "base")
    if template is not None:
        tiny.tokenizer(template).save_pretrained(base)
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    tiny.write_rows(Path(data["train"]), tiny.sums(9))
    tiny.write_rows(Path(data["test"]), test)
    file = tiny.write_recipe(folder / "recipe.yaml", base, Path("unused"), data=data, eval={"suite": suite})
    notes: list[str] = examine(recipe.load(file), 0).data.findings["notes"]
    return notes


def long_row(name: str, size: int) -> dict[str, str]:
    """A row that is longer than the tiny model's context of 512 tokens, or not."""
    return {"id": name, "prompt": "w" * size, "completion": "x"}


def test_check_names_rows_that_will_not_be_asked(tmp_path: Path) -> None:
    notes = check(tmp_path, [*tiny.sums(3, 20), long_row("long", 600), long_row("longer", 10_000_000)])
    words = "warning: 2 of 5 held-out rows are longer than the model's context of 512 tokens and are not asked"
    assert f"{words} (long, longer)" in notes


def test_check_says_how_many_worked_examples_fit(tmp_path: Path) -> None:
    notes = check(tmp_path, [long_row("a", 430), *tiny.sums(3, 20)])
    assert any(note.startswith("few-shot: 1 worked examples, not 5") for note in notes)
    assert not any("few-shot" in note for note in check(tmp_path / "two", tiny.sums(3, 20)))


def test_check_refuses_rows_of_which_none_can_be_asked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: data\.test: all 2 held-out rows are longer .*\(a, b\)"):
        check(tmp_path, [long_row("a", 600), long_row("b", 700)])
    assert check(tmp_path / "none", [long_row("a", 600)], suite="none")


def test_check_refuses_a_test_row_that_the_template_refuses(tmp_path: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + tiny.CHATML
    )
    chat = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    for suite in ("quick", "none"):
        folder = tmp_path / suite
        with pytest.raises(RecipeError, match=r"test\.jsonl:4: the chat template rejects .*no system turns"):
            check(folder, [{"messages": one} for one in (chat[1:], chat[1:], chat[1:], chat)], suite, template)


def test_notes_are_part_of_the_findings(tmp_path: Path) -> None:
    assert json.dumps(check(tmp_path, [*tiny.sums(3, 20), long_row("long", 600)]))
