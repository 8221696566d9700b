"""eval.metrics: each metric is the library's own number on the same rows, and one that says nothing is refused."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from llmtune import terminal
from llmtune.cli.output import scores as as_json
from llmtune.data.encoding.rules import Rules
from llmtune.data.row import Row
from llmtune.errors import FieldError, RecipeError
from llmtune.evaluation.aggregates import OfSums, add_metric
from llmtune.evaluation.held_out import choice
from llmtune.evaluation.held_out.answers import ROUGES, Scorer, scorer
from llmtune.evaluation.held_out.choice import AnswerFacts, choose
from llmtune.evaluation.held_out.fields import fields, score_fields
from llmtune.evaluation.held_out.labels import LabelTexts, add_labels, likeliest
from llmtune.evaluation.held_out.losses import add_losses
from llmtune.evaluation.held_out.truth import Truth
from llmtune.evaluation.metrics import SEED, interval, resampled_sums
from llmtune.evaluation.questions import questions
from llmtune.evaluation.results import Result, compare_results
from llmtune.evaluation.step import evaluate
from llmtune.publishing.card import card
from llmtune.reporting.page import render
from tests.support import runs, tiny
from tests.support.pages import Page

TRUE = ["The mill stands by the river.", "Three old towns.", "The sea", "A hill", "no", "It runs to the sea."]
GIVEN = ["The old mill stands by a river.", "Three towns", "the sea!", "", "yes", "It runs to the sea."]
LABELS = ("left", "right", "straight on")


def empty() -> Result:
    """A result without any metric."""
    counts = {"shots": 0, "n": 6, "of": 6, "limit": None, "version": 1, "truncated": 0, "not_finite": 0}
    return {**counts, "metrics": {}, "scores": {}, "higher_is_better": {}, "resamples": {}}  # type: ignore[typeddict-item]


def scored(name: str, given: list[str], true: list[str]) -> Result:
    """Score answers to texts by one name of eval.metrics, as the harness does."""
    one, result = scorer(name), empty()
    assert isinstance(one, Scorer)
    items = [one.score(answer, Truth(truth, truth), "text") for answer, truth in zip(given, true, strict=True)]
    for metric, aggregation in one.aggregations.items():
        values = [item[metric] for item in items]
        add_metric(result, name, metric, aggregation(values), aggregation, dict(enumerate(values)), len(values))
    return result


def drawn(rows: int, times: int) -> list[list[int]]:
    """The rows that each of the first resamples draws."""
    generator = numpy.random.default_rng(SEED)
    return [generator.integers(0, rows, rows).tolist() for _ in range(times)]


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ('{"city": "Ulm", "days": [1, 2]}', '{"days": [1, 2], "city": "Ulm"}', (1, 1, 1)),
        ('{"city": "Bonn", "days": [1, 2], "x": null}', '{"city": "Ulm", "days": [1, 2]}', (2 / 4, 2 / 3, 4 / 7)),
        ('{"days": [2, 1]}', '{"days": [1, 2]}', (0, 0, 0)),
        ('{"a": true}', '{"a": 1}', (0, 0, 0)),
        ('{"a": {}}', '{"a": {}}', (1, 1, 1)),
        ("{}", '{"a": 1}', (0, 0, 0)),
        ("no JSON", '{"a": 1}', (0, 0, 0)),
        ("[" * 900 + "]" * 900, '{"a": 1}', (0, 0, 0)),
    ],
)
def test_fields_are_right_by_path_and_value(answer: str, truth: str, expected: tuple[float, ...]) -> None:
    assert score_fields(answer, truth) == pytest.approx(expected)


def test_field_f1_is_the_samples_average_of_scikit_learn() -> None:
    true = [{"a": n, "b": [n, 1], "c": {"d": n % 2}} for n in range(6)]
    given = [{"a": n, "b": [1], "c": {"d": 1}, "e": n} for n in range(6)]
    result = scored("json", list(map(json.dumps, given)), list(map(json.dumps, true)))
    encoder = MultiLabelBinarizer()
    both = encoder.fit_transform([list(fields(value)) for value in [*true, *given]])
    expected = f1_score(both[:6], both[6:], average="samples")
    assert result["metrics"]["field_f1"]["value"] == pytest.approx(expected)
    assert result["metrics"]["valid_json"]["value"] == 1.0


def test_rouge_is_the_mean_of_the_librarys_f() -> None:
    result, library = scored("rouge", GIVEN, TRUE), RougeScorer(list(ROUGES))
    for name in ROUGES:
        values = [library.score(truth, answer)[name].fmeasure for truth, answer in zip(TRUE, GIVEN, strict=True)]
        assert result["metrics"][name]["value"] == pytest.approx(sum(values) / 6)
    # "three towns" has 2 of 2 words right, of 3: F = 2 * 1 * (2/3) / (1 + 2/3); in pairs 0 of 1.
    assert [result["scores"][name][1] for name in ("rouge1", "rouge2")] == pytest.approx([0.8, 0.0])


def test_chrf_of_drawn_rows_is_sacrebleus_own() -> None:
    result = scored("chrf", GIVEN, TRUE)
    assert result["metrics"]["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(GIVEN, [TRUE]).score)
    for rows, value in zip(drawn(6, 5), result["resamples"]["chrf"], strict=False):
        texts = sacrebleu.corpus_chrf([GIVEN[row] for row in rows], [[TRUE[row] for row in rows]])
        assert value == pytest.approx(texts.score)
    # One letter: the only order that both have is 1; precision 1/2, recall 1: F = 5 * P * R / (4 * P + R).
    assert scored("chrf", ["ab"], ["a"])["metrics"]["chrf"]["value"] == pytest.approx(100 * 2.5 / 3)


def test_pattern_is_searched_in_each_answer() -> None:
    result = scored("regex:^(The|It){1,2} ", [*GIVEN[:5], "  It runs. "], TRUE)
    assert result["scores"] == {"regex:^(The|It){1,2} ": [1, 0, 0, 0, 0, 1]}


def test_label_scores_are_scikit_learns_on_all_rows_and_on_drawn_ones() -> None:
    true = ["a", "a", "b", "c", "a", "b", "a", "d"]
    given = ["a", "b", "b", "a", "a", None, "a", "a"]
    result = empty()
    add_labels(result, "labels", given, true)
    answers = [label or "" for label in given]
    values = {name: score["value"] for name, score in result["metrics"].items()}
    expected = f1_score(true, answers, average="macro", zero_division=0)
    assert values == pytest.approx({"label_accuracy": accuracy_score(true, answers), "label_f1": expected})
    # a: 3 of 5 answers right, of 4 true ones: 6/9; b: 1 of 2, of 2: 2/4; c, d and no label: 0.
    assert values == pytest.approx({"label_accuracy": 4 / 8, "label_f1": (6 / 9 + 2 / 4) / 5})
    for rows, value in zip(drawn(8, 20), result["resamples"]["label_f1"], strict=False):
        pair = [true[row] for row in rows], [answers[row] for row in rows]
        assert value == pytest.approx(f1_score(*pair, average="macro", zero_division=0))


WAYS = ("left", "west", "down", "east")


def log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    """The log-likelihood of an answer's tokens after a prompt, from one pass over both."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logs = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("is_alike", [True, False])
def test_likeliest_label_is_that_of_the_whole_answer_with_its_stop_token(
    monkeypatch: pytest.MonkeyPatch, kind: str, is_alike: bool
) -> None:
    model, tokenizer = tiny.model(kind, initializer_range=0.4).eval(), tiny.tokenizer()
    turns = [({"role": "user", "content": "q" * n}, {"role": "assistant", "content": WAYS[n % 4]}) for n in range(6)]
    rows = [Row(f"r{n}", turn, f"t:{n}") for n, turn in enumerate(turns)]
    rules = Rules(512, "drop", "last_answer")
    asked = questions(rows, [], None, tokenizer, {2}, rules)
    if not is_alike:
        monkeypatch.setattr("llmtune.evaluation.held_out.labels._alike", lambda *_: {})
    steps: list[float] = []
    given = likeliest(model, asked, LabelTexts(WAYS, tokenizer, {2}, rules), lambda amount=1: steps.append(amount))
    for prompt, label in zip(asked.prompt_ids, given, strict=True):
        ends = {label: [*tokenizer(label, add_special_tokens=False)["input_ids"], 2] for label in WAYS}
        logs = {label: log_likelihood(model, list(prompt), ids) for label, ids in ends.items()}
        assert label == max(logs, key=lambda label: logs[label])
    assert (len(set(given)) > 1, sum(steps)) == (True, 6)


def test_perplexity_follows_from_the_loss_on_all_rows_and_on_drawn_ones() -> None:
    losses, tokens, result = [2.0, 9.0, 1.0, 4.0], [2, 3, 1, 4], empty()
    add_losses(result, losses, tokens)
    loss, perplexity = result["metrics"]["loss"], result["metrics"]["perplexity"]
    assert perplexity["value"] == pytest.approx(numpy.exp(16 / 10))
    assert perplexity["interval"] == pytest.approx(numpy.exp(loss["interval"]))
    for rows, value in zip(drawn(4, 5), result["resamples"]["perplexity"], strict=False):
        assert value == pytest.approx(numpy.exp(sum(losses[n] for n in rows) / sum(tokens[n] for n in rows)))
    add_losses(broken := empty(), [800.0, None], [1, 1])
    assert broken["metrics"]["perplexity"]["value"] is None
    assert broken["not_finite"] == 1


def test_interval_of_a_difference_is_of_the_same_drawn_rows() -> None:
    generator = numpy.random.default_rng(3)
    true = [f"word {n} of the text" for n in range(40)]
    old = [text if generator.random() < 0.3 else f"word {n}" for n, text in enumerate(true)]
    new = [text if generator.random() < 0.8 else answer for text, answer in zip(true, old, strict=True)]
    results = [scored("chrf", answers, true) for answers in (new, old)]
    rouges = [scored("rouge", answers, true) for answers in (new, old)]
    gaps = compare_results(results[0], results[1]) | compare_results(rouges[0], rouges[1])
    rows = numpy.random.default_rng(9).integers(0, 40, (4000, 40))  # a bootstrap of the test's own
    for name, pair in {"chrf": None, "rouge1": [numpy.array(one["scores"]["rouge1"]) for one in rouges]}.items():
        low, high = gaps[name]["interval"]
        assert 0 < low < (gaps[name]["difference"] or 0) < high
        if pair:
            own = numpy.percentile((pair[0] - pair[1])[rows].mean(1), [2.5, 97.5])
            assert (low, high) == pytest.approx(own, abs=0.02)
    pairs = zip(*(one["resamples"]["chrf"] for one in results), strict=True)
    assert gaps["chrf"]["interval"] == interval([a - b for a, b in pairs if a is not None and b is not None])
    assert len(resampled_sums(numpy.ones((3, 1)))) == 1000
    assert OfSums(lambda sums: sums[:, 0])([[1.0], [2.0]]) == 3.0


def facts(*answers: str, **more: Any) -> AnswerFacts:
    """The facts of some answers."""
    result = AnswerFacts()
    for answer in answers:
        result.add(answer, **more)
    return result


def rows_of(*answers: str, **more: Any) -> list[Row]:
    """Training rows with these answers."""
    turns = [({"role": "user", "content": "?"}, {"role": "assistant", "content": text, **more}) for text in answers]
    return [Row(f"r{n}", turn, f"t:{n}") for n, turn in enumerate(turns)]


LONG = "a text that goes on and on " * 4
CYRILLIC = "\u0420\u0435\u043a\u0430"
CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
FREE = rows_of(*map(str, range(400)))


@pytest.mark.parametrize(
    ("wanted", "answers", "train", "words"),
    [
        (["json"], facts("{}", "yes"), [], "json needs held-out answers that are all JSON objects or lists"),
        (["rouge"], facts(CYRILLIC), [], "rouge reads Latin letters and digits alone, .* try chrf"),
        (["labels"], facts("yes"), FREE, "labels needs training answers that are labels .* more than 200 differ"),
        (["labels"], facts("yes"), FREE[:9], "9 of 9 differ; try exact_match"),
        (["labels"], facts("yes"), rows_of("yes", "yes"), "1 of 2 differ"),
        (["labels"], facts("yes"), rows_of("yes", LONG), "one has 107 characters"),
        (["labels"], facts("yes"), rows_of("yes", "", **CALL), "some have tool calls"),
        (["labels"], facts("yes"), rows_of("yes", "no", reasoning_content="hm"), "some have thoughts"),
        (["perplexity", "chrf"], AnswerFacts(), [], "chrf needs answers, and the held-out rows are plain texts"),
        (["regex:^(a|a)*$"], facts("yes", "a" * 40), [], r"regex:\^\(a\|a\)\*\$ takes more than 0.2 s on one answer"),
    ],
)
def test_refuses_a_metric_that_says_nothing_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, wanted: list[str], answers: AnswerFacts, train: list[Row], words: str
) -> None:
    monkeypatch.setattr(choice, "MATCH_SECONDS", 0.2)
    with pytest.raises(FieldError, match=f"eval.metrics: .*{words}") as error:
        choose(wanted, answers, train)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("answers", "train", "metrics"),
    [
        (facts('{"a": 1}', "[]"), [], ("exact_match", "json")),
        (facts("yes", "no"), rows_of(*["yes", "no"] * 5), ("exact_match", "labels")),
        (facts("yes", "no"), rows_of(*["yes", "no"] * 4), ("exact_match",)),
        (facts(*map(str, range(30))), rows_of(*map(str, [*range(30)] * 9)), ("exact_match",)),
        (facts(LONG, LONG), rows_of(LONG), ("exact_match", "rouge", "chrf")),
        (facts(LONG, CYRILLIC * 40), rows_of(LONG), ("exact_match", "chrf")),
        (facts(LONG, is_call=True), rows_of(LONG), ("exact_match",)),
        (AnswerFacts(), [], ()),
    ],
    ids=["JSON", "labels", "too few rows", "too many labels", "texts", "other letters", "calls", "plain texts"],
)
def test_chooses_metrics_by_the_data(answers: AnswerFacts, train: list[Row], metrics: tuple[str, ...]) -> None:
    assert choose(None, answers, train)[0] == metrics


def test_answer_on_which_a_pattern_hangs_ends_the_evaluation_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MATCH_SECONDS", 0.1)
    with pytest.raises(FieldError, match=r"eval\.metrics: .* takes more than 0\.1 s"):
        scored("regex:^(a|a)*$", ["a" * 40 + "b"], ["a"])


def test_check_refuses_a_metric_before_training(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.json:\d+: eval.metrics: json needs held-out answers that are all"):
        runs.with_held_out_rows(tmp_path, eval={**runs.QUICK, "metrics": ["json"]})


def test_every_metric_is_shown_with_its_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"r{n}", "prompt": f"which way {n}?", "completion": LABELS[n % 3]} for n in range(30)]
    metrics = ["labels", "rouge", "chrf", "perplexity", "regex:^[a-z]{4,5}, ?"]
    run = runs.with_held_out_rows(
        tmp_path, rows, step=0.3, publish={"repo": "me/mine"}, eval={**runs.QUICK, "metrics": metrics}
    )
    stored = evaluate(run)
    names = ["exact_match", *ROUGES, "chrf", metrics[-1], "label_accuracy", "label_f1", "loss", "perplexity"]
    held_out = stored["settings"]["held_out"]
    assert (held_out["metrics"], sorted(held_out["labels"])) == (["exact_match", *metrics], sorted(LABELS))
    gaps = stored["tuned"]["differences"]["base, zero-shot"]["held_out"]
    assert sorted(gaps) == sorted(names)
    assert all(len(gap["interval"]) == 2 for gap in gaps.values())
    assert {row["label"] for row in stored["tuned"]["rows"]} <= set(LABELS)
    assert set(stored["tuned"]["rows"][0]["scores"]) == {*ROUGES, metrics[-1], "label_accuracy"}
    terminal.scores(run)
    printed, page, written = capsys.readouterr().out, Page(render(run)), card(run)
    given: Any = as_json(run)
    for name in names:
        one = stored["tuned"]["results"]["held_out"]["metrics"][name]
        low, high = one["interval"]
        assert given["results"]["tuned"]["held_out"]["metrics"][name]["interval"] == [low, high]
        assert all(f"{one['value']:.3f}" in text for text in (printed, page.text, written)), name
        assert all(f"[{low:.3f} to {high:.3f}]" in text for text in (page.text, written)), name
        bounds = "{:+.3f} to {:+.3f}".format(*gaps[name]["interval"])
        assert all(bounds in text for text in (printed, page.text)), name
    titles = ("label F1", "ROUGE-L", "chrF", metrics[-1], "perplexity (lower is better)")
    assert all(title in printed for title in titles)
    assert "perplexity of held-out texts" not in page.text
