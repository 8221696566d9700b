"""General questions and texts: what a training cost, asked of base and tuned model and told wherever results are."""

from pathlib import Path

import pytest
import torch

from llmtune import terminal
from llmtune.errors import ProofError
from llmtune.evaluation.forgetting.general import ask_general, load_general
from llmtune.evaluation.forgetting.words import forgetting_notes, is_chance
from llmtune.evaluation.metrics import Score
from llmtune.evaluation.results import GENERAL_QUESTIONS, GENERAL_TEXTS
from llmtune.evaluation.spread import share
from llmtune.evaluation.step import evaluate
from llmtune.evaluation.tables import table
from llmtune.files import read_json, write_json
from llmtune.publishing.card import card
from tests.support import tiny
from tests.support.pages import page
from tests.support.rooms import recorded
from tests.support.runs import QUICK, with_held_out_rows

CHANCE = "the base does not know these questions: only the texts count"


def test_cost_of_a_training_is_told_with_its_results_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_held_out_rows(tmp_path, eval={**QUICK, "forgetting": True}, publish={"repo": "me/mine"})
    stored = evaluate(run)
    base, tuned = (stored[name]["results"] for name in ("base", "tuned"))
    gaps = stored["tuned"]["differences"]["base, zero-shot"]
    assert (base[GENERAL_QUESTIONS]["n"], base[GENERAL_TEXTS]["n"]) == (60, 20)
    assert gaps[GENERAL_QUESTIONS]["acc"]["n"] == 60
    assert {"won", "lost", "p"} <= gaps[GENERAL_QUESTIONS]["acc"].keys()
    assert gaps[GENERAL_TEXTS]["loss"]["stderr"] is not None
    assert len(stored["settings"]["general"]) == 64
    assert list(table(run)[0]) == ["model", "exact match", "loss", "n"]
    notes = forgetting_notes(base, tuned, gaps)
    before, after = (one[GENERAL_TEXTS]["metrics"]["loss"]["value"] for one in (base, tuned))
    assert notes[1:2] == [CHANCE]
    assert notes[2].startswith(f"loss on general texts (lower is better) {before:.2f} -> {after:.2f} (")
    capsys.readouterr()
    terminal.scores(run)
    for text in (capsys.readouterr().out, card(run), page(run).text):
        assert all(note[1:] in text for note in notes)

    file = run.eval / "base.json"
    write_json(file, {**(changed := read_json(file)), "settings": {**changed["settings"], "general": "other"}})
    run.mark("eval", [run.eval / f"{name}.json" for name in ("base", "tuned", "settings")])
    refusal = "results with different settings cannot be compared: general is '"
    for show in (table, card, terminal.scores):
        with pytest.raises(ProofError, match=refusal):
            show(run)
    told = page(run).text
    assert refusal[1:] in told
    assert "general texts" not in told


def test_scores_are_the_models_own() -> None:
    model, tokenizer = tiny.model(initializer_range=0.3).eval(), tiny.tokenizer()
    general = load_general(tokenizer, 512)
    results = ask_general(general, model, tokenizer)

    def loss(ids: list[int], labels: list[int]) -> float:
        with torch.no_grad():
            one = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        return float(one) * sum(label != -100 for label in labels[1:])

    for number in range(0, 60, 20):
        per_character = [
            loss(end.input_ids, end.labels) / length
            for end, length in zip(general.questions[number], general.lengths[number], strict=True)
        ]
        is_right = per_character[0] == min(per_character)
        assert results[GENERAL_QUESTIONS]["scores"]["acc"][number] == is_right
    text = general.texts[3]
    assert results[GENERAL_TEXTS]["scores"]["loss"][3] == pytest.approx(loss(text.input_ids, text.labels), rel=1e-5)


def test_reads_each_question_once_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    questions = load_general(tokenizer, 512)
    monkeypatch.setattr(share, "world", lambda: 2)
    monkeypatch.setattr(share, "gather", lambda results: [[(place, 1.0) for place in range(260)], results])
    shapes = recorded(model)
    ask_general(questions, model, tokenizer)
    assert sum(rows for rows, _ in shapes) == 30 + 4 * 30 + 10, "questions, their ends, and texts: half of all"


def test_no_rule_without_knowledge_answers_the_questions() -> None:
    general = load_general(tiny.tokenizer(), 512)
    assert len({row[0].id for row in general.questions}) == len(general.questions) == 60
    assert all(len({tuple(end.input_ids) for end in row}) == 4 for row in general.questions)
    for choose in (min, max):
        right = sum(lengths[0] == choose(lengths) and lengths.count(lengths[0]) == 1 for lengths in general.lengths)
        assert right < 22, "the length of an end gives it away"


@pytest.mark.parametrize(("right", "chance"), [(15, True), (20, True), (22, False), (46, False)])
def test_a_base_that_guesses_is_told(right: int, chance: bool) -> None:
    score: Score = {"value": right / 60, "stderr": None, "n": 60}
    assert is_chance(score) == chance
