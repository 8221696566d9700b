"""Metrics of all rows at once: aggregated for each model, and compared with the errors of the same resampled rows."""

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import sacrebleu
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from llmtune.evaluation.aggregates import resample
from llmtune.evaluation.harness import score_tasks
from llmtune.evaluation.metrics import interval, spread
from llmtune.evaluation.results import Result, compare_results
from llmtune.evaluation.tasks import load_tasks
from tests.support import tiny
from tests.support.suites import load, mine

ROWS: list[dict[str, Any]] = [
    {"q": f"is {n} odd?", "a": n % 2, "text": f"{'yes' if n % 2 else 'no'} it is {n}"} for n in range(12)
]
WIDE = 0.3


def task(folder: Path, metrics: list[str], output: str = "multiple_choice", **keys: Any) -> Any:
    """Load a task with these metrics on twelve rows."""
    rows = tiny.write_rows(folder / "twelve.jsonl", ROWS)
    more: dict[str, Any] = {"dataset_kwargs": {"data_files": {"test": str(rows)}}, "output_type": output}
    if output != "multiple_choice":
        more |= {"doc_to_choice": None, "doc_to_target": "{{text}}"}
    more["metric_list"] = [{"metric": metric} for metric in metrics]
    (loaded,) = load_tasks(load(folder, mine(folder, **{**more, **keys})))
    return loaded


def model(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Make a model whose logits differ much from token to token."""
    return tiny.model(seed=seed, initializer_range=WIDE).eval().to(dtype)


def scores(folder: Path, seed: int, metrics: list[str], output: str = "multiple_choice", **keys: Any) -> Result:
    """Score a model on a task."""
    return score_tasks(model(seed), tiny.tokenizer(), [task(folder, metrics, output, **keys)])["mine"]


def log_likelihood(one: Any, before: str, after: str) -> float:
    """Compute a text's log-likelihood after another one from fp32 log-softmax, in numpy."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer(before + after).input_ids
    with torch.no_grad():
        logits = one(torch.tensor([ids])).logits[0].float().double().numpy()
    logs = logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))
    start = len(tokenizer(before).input_ids)
    return float(sum(logs[place - 1, ids[place]] for place in range(start, len(ids))))


def drawn(rows: int, times: int = 4000) -> numpy.ndarray:
    """Draw rows with replacement, for a bootstrap of the test's own."""
    return numpy.random.default_rng(5).integers(0, rows, (times, rows))


def test_difference_of_perplexities_is_that_of_both_models(tmp_path: Path) -> None:
    short = {"doc_to_target": "{{a}}"}
    new, old = (scores(tmp_path, seed, ["perplexity", "acc"], "loglikelihood", **short) for seed in (1, 2))
    logs = [numpy.array([log_likelihood(model(seed), row["q"], str(row["a"])) for row in ROWS]) for seed in (1, 2)]
    expected = [math.exp(-values.mean()) for values in logs]
    assert [one["metrics"]["perplexity"]["value"] for one in (new, old)] == pytest.approx(expected, rel=1e-3)
    assert new["higher_is_better"] == {"perplexity": False, "acc": True}
    assert "perplexity" not in new["scores"]
    gap = compare_results(new, old)["perplexity"]
    assert gap["difference"] == pytest.approx(expected[0] - expected[1], rel=1e-3)
    rows = drawn(12)
    resampled = numpy.exp(-logs[0][rows].mean(1)) - numpy.exp(-logs[1][rows].mean(1))
    assert gap["stderr"] == pytest.approx(resampled.std(), rel=0.15)
    assert gap["interval"][0] < expected[0] - expected[1] < gap["interval"][1]


def test_lower_perplexity_is_called_better(tmp_path: Path) -> None:
    one, two = (scores(tmp_path, seed, ["perplexity"], "loglikelihood", doc_to_target="{{a}}") for seed in (1, 2))
    new, old = sorted((one, two), key=lambda result: result["metrics"]["perplexity"]["value"] or 0)
    better, worse = compare_results(new, old)["perplexity"], compare_results(old, new)["perplexity"]
    assert (better["difference"] or 0) < 0 < (worse["difference"] or 0)
    assert {(better["verdict"], worse["verdict"])} <= {("better", "worse"), ("no difference measured",) * 2}
    shifted: Result = {**old, "metrics": {"perplexity": {**old["metrics"]["perplexity"]}}}
    shifted["metrics"]["perplexity"]["value"] = (new["metrics"]["perplexity"]["value"] or 0) + 1e6
    shifted["resamples"] = {"perplexity": [(value or 0) + 1e6 for value in new["resamples"]["perplexity"]]}
    assert compare_results(new, shifted)["perplexity"]["verdict"] == "better"
    assert compare_results(shifted, new)["perplexity"]["verdict"] == "worse"


def test_rolling_perplexities_weigh_rows_by_words_and_bytes(tmp_path: Path) -> None:
    metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    keys: dict[str, Any] = {"doc_to_text": "", "num_fewshot": 0}
    new, old = (scores(tmp_path, seed, metrics, "loglikelihood_rolling", **keys) for seed in (1, 2))
    for result, seed in ((new, 1), (old, 2)):
        # The text begins after the prefix token, which is the tokenizer's stop token.
        logs = sum(log_likelihood(model(seed), "<|im_end|>", row["text"]) for row in ROWS)
        size = sum(len(row["text"].encode()) for row in ROWS)
        assert result["metrics"]["byte_perplexity"]["value"] == pytest.approx(math.exp(-logs / size), rel=1e-4)
        assert result["metrics"]["bits_per_byte"]["value"] == pytest.approx(-logs / size / math.log(2), rel=1e-4)
    assert not any(new["higher_is_better"].values())
    for metric, gap in compare_results(new, old).items():
        values = [one["metrics"][metric]["value"] or 0 for one in (new, old)]
        assert gap["difference"] == values[0] - values[1]
        assert gap["stderr"] is not None


def test_bleu_compares_both_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {1: [row["text"] for row in ROWS], 2: [f"no it is {row['q']}" for row in ROWS]}
    results = []
    for seed, texts in answers.items():
        by_prompt = {row["q"]: text for row, text in zip(ROWS, texts, strict=True)}
        monkeypatch.setattr(
            HFLM, "generate_until", lambda self, requests, known=by_prompt, **_: [known[r.args[0]] for r in requests]
        )
        results.append(scores(tmp_path, seed, ["bleu", "ter"], "generate_until"))
    new, old = results
    references = [[row["text"] for row in ROWS]]
    expected = [sacrebleu.corpus_bleu(texts, references).score for texts in answers.values()]
    gap = compare_results(new, old)
    assert gap["bleu"]["difference"] == pytest.approx(expected[0] - expected[1])
    assert (gap["bleu"]["verdict"], gap["ter"]["verdict"]) == ("better", "better")
    assert (gap["ter"]["difference"] or 0) < 0
    assert len(new["resamples"]["bleu"]) == 100


@pytest.mark.slow
def test_f1_is_that_of_all_rows(tmp_path: Path) -> None:
    result = scores(tmp_path, 1, ["f1", "mcc", "acc"])
    right = result["scores"]["acc"]
    odd = [bool(row["a"]) for row in ROWS]
    hits = sum(bool(ok) and one for ok, one in zip(right, odd, strict=True))
    called_odd = sum(bool(ok) == one for ok, one in zip(right, odd, strict=True))
    assert result["metrics"]["f1"]["value"] == pytest.approx(2 * hits / (called_odd + sum(odd)))
    assert set(result["scores"]) == {"acc"}
    assert set(result["resamples"]) == {"f1", "mcc"}


def test_mean_metrics_are_lm_evals_own_to_the_bit(tmp_path: Path) -> None:
    ours = scores(tmp_path, 1, ["acc", "acc_norm"])
    plain = HFLM(
        pretrained=model(1), backend="causal", tokenizer=tiny.tokenizer(), batch_size=8, softmax_dtype="float32"
    )
    theirs = evaluate(plain, {"tasks": {"mine": task(tmp_path, ["acc", "acc_norm"])}})["results"]["mine"]
    for metric in ("acc", "acc_norm"):
        one = ours["metrics"][metric]
        assert (one["value"], one["stderr"]) == (theirs[f"{metric},none"], theirs[f"{metric}_stderr,none"])


def test_log_likelihoods_of_bf16_model_are_those_of_fp32(tmp_path: Path) -> None:
    rough = model(1, torch.bfloat16)
    for limit in range(1, 4):  # one row a batch: others would change its logits in bf16
        one = tiny.write_rows(tmp_path / f"{limit}.jsonl", ROWS[limit : limit + 1])
        files = {"dataset_kwargs": {"data_files": {"test": str(one)}}}
        questions = task(tmp_path, ["perplexity"], "loglikelihood", **files)
        value = score_tasks(rough, tiny.tokenizer(), [questions])["mine"]["metrics"]["perplexity"]["value"]
        assert value is not None
        expected = log_likelihood(rough, ROWS[limit]["q"], ROWS[limit]["text"])
        assert -math.log(value) == pytest.approx(expected, abs=1e-3)


def test_resamples_are_the_same_rows_for_every_model() -> None:
    items = {row: float(row) for row in range(50)}
    one = resample(sum, items, 50, "sum")
    other = resample(sum, {row: value + 1 for row, value in items.items()}, 50, "sum")
    assert {round(b - a, 9) for a, b in zip(one, other, strict=True) if a is not None and b is not None} == {50.0}


def test_resample_without_a_value_leaves_no_error() -> None:
    values = resample(lambda items: 1 / (sum(items) - 1), {0: 0, 1: 1}, 2, "odd")
    assert None in values
    assert spread(values) is None
    assert interval(values) is None


def test_resampling_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.evaluation.aggregates.SECONDS", 0.0)
    assert len(resample(sum, {0: 1, 1: 2}, 2, "slow")) == 20
