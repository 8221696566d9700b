"""Held-out rows of every kind: what is asked, what an answer is compared with, and the loss of plain texts."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune import terminal
from llmtune.data.encoding.rules import Rules
from llmtune.data.example import IGNORED, Example
from llmtune.data.gate import Gate
from llmtune.data.row import Message, Row
from llmtune.evaluation import exam
from llmtune.evaluation.held_out.texts import Texts, score_texts, windows
from llmtune.evaluation.held_out.truth import Truth, TruthReader, comparison, kinds_of, same
from llmtune.evaluation.questions import Survey, fitting_shots, questions
from llmtune.evaluation.step import evaluate
from llmtune.files import read_json
from llmtune.publishing.card import card
from llmtune.reporting.page import render
from tests.support import runs, tiny
from tests.support.pages import Page

USER: Message = {"role": "user", "content": "How warm is it in Ulm?"}
TOOL = {"type": "function", "function": {"name": "warmth", "description": "", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "warmth", "arguments": {"city": "Ulm", "days": [1, 2]}}}
HERMES = '<tool_call>\n{"name": "warmth", "arguments": {"city": "Ulm", "days": [1, 2]}}\n</tool_call>'
STOP = "<|im_end|>"


def truth(answer: Message, text: str, context: str = "") -> Truth:
    """The true answer of a row that learns `text` and its stop token, after a thought that is only read."""
    tokenizer = tiny.tokenizer()
    prompt, read, learned = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("ask:", context, text + STOP)
    )
    ids = [*prompt, *read, *learned]
    example = Example("r", "t:1", ids, [IGNORED] * (len(ids) - len(learned)) + learned, len(prompt))
    row = Row("r", (USER, {"role": "assistant", "content": "", **answer}), "t:1", tools=(TOOL,))
    truths = TruthReader([example], tokenizer, {2})
    assert truths.keeps_special == ("<|im_start|>" in text + context)
    return truths.read(row, example)


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ({"content": "Warm."}, " Warm.", Truth(" Warm.", " Warm.")),
        ({"tool_calls": [CALL]}, HERMES, Truth(HERMES, HERMES, is_call=True)),
        (
            {"content": "Warm.", "reasoning_content": "June."},
            "<think>\nJune.\n</think>\n\nWarm.",
            Truth("<think>\nJune.\n</think>\n\nWarm.", "\n\nWarm.", "</think>"),
        ),
        (
            {"content": "<think>June.</think>Warm."},
            "<think>June.</think>Warm.",
            Truth("<think>June.</think>Warm.", "Warm.", "</think>"),
        ),
        (
            {"content": "Warm.", "reasoning_content": "June."},
            "thought\nJune.<|im_start|>final\nWarm.",
            Truth("thought\nJune.<|im_start|>final\nWarm.", "Warm.", "<|im_start|>final"),
        ),
        (
            {"tool_calls": [CALL], "reasoning_content": "June."},
            'June.<|im_start|>warmth{"city": "Ulm"}',
            Truth('June.<|im_start|>warmth{"city": "Ulm"}', 'warmth{"city": "Ulm"}', "<|im_start|>", True),
        ),
        # A thought that the template drops, and whose words stand in the answer.
        ({"content": "4 apples", "reasoning_content": "4"}, "4 apples", Truth("4 apples", "4 apples")),
    ],
)
def test_true_answer_is_what_is_learned_and_what_follows_its_thought_is_compared(
    answer: Message, text: str, expected: Truth
) -> None:
    assert truth(answer, text) == expected


def test_a_thought_that_is_only_read_is_no_part_of_the_true_answer() -> None:
    answer = truth({"content": "Warm.", "reasoning_content": "June."}, "Warm.", "<think>June.</think>")
    assert answer == Truth("Warm.", "Warm.", "</think>")
    assert answer.compared("<think>Or July?</think>\nWarm.") == "\nWarm."
    assert answer.compared("Warm.") == "Warm."
    assert comparison([answer]) == "text; thoughts are not compared"


@pytest.mark.parametrize(
    ("output", "right"),
    [
        (HERMES, True),
        ('<tool_call>{"arguments":{"days":[1,2],"city":"Ulm"},"name":"warmth"}</tool_call>  ', True),
        (HERMES.replace("Ulm", "Bonn"), False),
        (HERMES.replace("[1, 2]", "[2, 1]"), False),
        (HERMES.replace('"warmth"', '"rain"'), False),
        (HERMES.replace("1", "true"), False),
        (HERMES + HERMES, False),
        (HERMES[:-20], False),
        ("It is warm.", False),
        ("{" * 3000, False),
    ],
)
def test_compares_tool_calls_by_name_and_arguments(output: str, right: bool) -> None:
    assert same(output, HERMES, "tool calls") is right


def test_each_answer_is_compared_by_its_kind() -> None:
    call, warm, number = Truth(HERMES, HERMES, is_call=True), Truth("Warm.", "Warm."), Truth("{}", "{}")
    assert kinds_of([call, number]) == ["tool calls", "JSON"]
    assert kinds_of([call, warm, number]) == ["tool calls", "text", "text"]
    assert comparison([call, warm, number]) == "tool calls in 1 rows, text in 2 rows"
    assert comparison([warm]) == "text"


def chat(place: int, *turns: Message, **fields: Any) -> Row:
    """A row of these turns."""
    return Row(f"r{place}", turns or (USER, {"role": "assistant", "content": "Warm."}), f"t:{place}", **fields)


def test_worked_examples_with_other_tools_are_left_out() -> None:
    tokenizer, rules = tiny.tokenizer(), Rules(512, "drop", "last_answer")
    survey = Survey().add(questions([chat(1)], [], None, tokenizer, {2}, rules))
    shots = [chat(2, tools=(TOOL,)), chat(3), Row("text", (), "t:4", text="A text.")]
    kept, notes = fitting_shots(shots, survey, tokenizer, rules)
    assert [row.id for row in kept] == ["r3"]
    assert notes == ["few-shot: 1 worked examples, not 2: the others have other tools"]
    kept, notes = fitting_shots(shots[:1], survey, tokenizer, rules)
    assert (kept, len(notes)) == ([], 1)
    assert "the worked examples have other tools than the questions" in notes[0]


def test_a_template_that_takes_no_worked_examples_ends_nothing() -> None:
    one_turn = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + tiny.CHATML
    tokenizer, rules = tiny.tokenizer(one_turn), Rules(512, "drop", "last_answer")
    survey = Survey().add(questions([chat(1)], [], None, tokenizer, {2}, rules))
    kept, (note,) = fitting_shots([chat(2)], survey, tokenizer, rules)
    assert kept == []
    assert note.startswith("few-shot is left out: ")
    assert "one turn only" in note


def test_survey_keeps_the_longest_questions_and_counts_thoughts_as_answer() -> None:
    tokenizer, rules = tiny.tokenizer(), Rules(512, "drop", "last_answer")
    rows = [
        chat(n, {"role": "user", "content": "q" * n}, {"role": "assistant", "content": "yes"}) for n in range(1, 30)
    ]
    survey = Survey()
    for start in range(0, 29, 10):
        survey.add(questions(rows[start : start + 10], [], None, tokenizer, {2}, rules))
    assert sorted(row.id for _, _, row in survey.longest) == sorted(f"r{n}" for n in range(22, 30))
    assert (survey.asked, survey.answer_tokens) == (29, len("yes") + 1)


def test_windows_predict_every_token_of_a_text_but_the_first_once() -> None:
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer("a text of bytes", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    row = Row("d", (), "t:1", text="a text of bytes")
    cut = windows(row, tokenizer, 5)
    assert [one for window in cut for one in window[1:]] == ids[1:]
    assert all(1 < len(window) <= 5 for window in cut)
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(cut))
    assert windows(row, tokenizer, 100) == [ids]
    assert windows(replace(row, goes_on=True), tokenizer, 100) == [ids[:-1]], "a cut is no end"


def test_loss_of_texts_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.evaluation.held_out.texts._BATCH", 2)
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    rows = [Row(f"d{n}", (), f"t:{n}", text="word " * n) for n in (3, 1, 9)]
    steps: list[float] = []
    result, answers = score_texts(model, Texts(rows, 7, 16), tokenizer, 3, lambda amount: steps.append(amount))
    sums, tokens = [], []
    for row in rows:
        total, count = 0.0, 0
        for ids in windows(row, tokenizer, 16):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
            count += len(ids) - 1
        sums.append(total)
        tokens.append(count)
    assert result["scores"]["loss"] == pytest.approx(sums, rel=1e-5)
    assert (result["tokens"], sum(steps)) == (tokens, 3)
    loss, perplexity = (result["metrics"][name]["value"] for name in ("loss", "perplexity"))
    assert loss == pytest.approx(sum(sums) / sum(tokens), rel=1e-5)
    assert perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)
    assert (result["n"], result["of"], result["limit"]) == (3, 7, 3)
    assert answers[0]["loss"] == pytest.approx(sums[0] / tokens[0], rel=1e-5)
    assert json.dumps(answers[2]).count("word") == 9


@pytest.mark.parametrize("is_mixed", [False, True])
def test_texts_are_evaluated_reported_and_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_mixed: bool
) -> None:
    run = runs.with_held_out_rows(tmp_path, step=0.3, publish={"repo": "me/mine"}, eval={**runs.QUICK, "limit": 2})
    rows = [Row(f"d{n}", (), f"t:{n}", text=f"Once upon a time {n}") for n in range(4)]
    chats = [chat(n) for n in range(5, 9)] if is_mixed else []
    findings = read_json(run.data_file)
    monkeypatch.setattr(exam, "gate", lambda *_: Gate([], [], [*rows, *chats], [chat(9)], findings))
    stored = evaluate(run)
    key = "held_out_texts" if is_mixed else "held_out"
    base, tuned = (stored[name]["results"][key]["metrics"] for name in ("base", "tuned"))
    assert list(tuned) == ["loss", "perplexity"]
    assert tuned["loss"]["value"] != base["loss"]["value"]
    change = stored["tuned"]["differences"]["base, zero-shot"][key]
    assert list(change) == ["loss", "perplexity"]
    assert change["loss"]["difference"] == pytest.approx((tuned["loss"]["value"] or 0) - (base["loss"]["value"] or 0))
    assert stored["settings"]["texts"]["window"] == 512
    assert list(stored["base"]["results"]) == (
        ["held_out", "held_out_few_shot", "held_out_texts"] if is_mixed else ["held_out"]
    )
    texts = [row for row in stored["tuned"]["rows"] if row.get("kind") == "text"]
    assert [row["question"] for row in texts] == ["Once upon a time 0", "Once upon a time 1"]
    terminal.scores(run)
    printed, page, written = capsys.readouterr().out, Page(render(run)), card(run)
    shown = f"{tuned['loss']['value']:.3f}"
    assert all(shown in text for text in (printed, page.text, written))
    assert "loss (lower is better)" in printed
    if not is_mixed:
        assert f"{tuned['perplexity']['value']:.3f}" in printed
        assert "perplexity of held-out texts; base: " in page.text
        assert "Compared: every token of plain texts." in written
        assert "exact match" not in printed + page.text + written
