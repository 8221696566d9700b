"""Scores, standard errors, paired differences, and what counts as the same answer."""

import math
from typing import Any, cast

import numpy
import pytest

from llmtune.evaluation.held_out import truth
from llmtune.evaluation.metrics import (
    Difference,
    difference,
    format_difference,
    format_score,
    mcnemar,
    score,
    verdict,
)


def test_mean_has_sample_standard_error() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    result = score(values)
    assert (result["value"], result["n"]) == (0.6, 5)
    assert result["stderr"] == pytest.approx(numpy.std(values, ddof=1) / 5**0.5)


def test_token_weighted_error_matches_bootstrap() -> None:
    generator = numpy.random.default_rng(0)
    tokens = generator.integers(2, 30, 200)
    sums = tokens * generator.normal(2.0, 0.5, 200)
    result = score(sums.tolist(), tokens.tolist())
    drawn = generator.integers(0, 200, (4000, 200))
    resampled = sums[drawn].sum(1) / tokens[drawn].sum(1)
    assert result["value"] == pytest.approx(sums.sum() / tokens.sum())
    assert result["stderr"] == pytest.approx(resampled.std(), rel=0.1)


def test_single_row_has_no_standard_error() -> None:
    assert score([1.0])["stderr"] is None
    assert format_score(1.0, None) == "1.000"
    assert format_score(0.5, 0.5) == "0.500 ± 0.500"


def test_paired_difference_has_paired_error() -> None:
    old = [0.0, 1.0] * 20
    new = [1.0, 1.0] * 19 + [0.0, 1.0]
    result = difference(new, old)
    differences = numpy.array(new) - numpy.array(old)
    assert result["difference"] == pytest.approx(differences.mean())
    assert result["stderr"] == pytest.approx(differences.std(ddof=1) / 40**0.5)
    assert (result["won"], result["lost"]) == (19, 0)


@pytest.mark.parametrize(("won", "lost", "p"), [(0, 0, 1.0), (5, 5, 1.0), (5, 0, 0.0625), (1, 8, 0.0390625)])
def test_mcnemar_equals_exact_two_sided_binomial(won: int, lost: int, p: float) -> None:
    assert mcnemar(won, lost) == pytest.approx(p)


@pytest.mark.parametrize(
    ("output", "same"),
    [
        (' {"b": [1], "a": true}\n', True),
        ('{"a": 1, "b": [1]}', False),
        ('{"a": true}', False),
        ('{"a": true, "b": [1]} and more', False),
        ("[" * 5000, False),
        ('{"a": NaN}', False),
        ("7", False),
    ],
)
def test_compares_json_answers_as_parsed_json(output: str, same: bool) -> None:
    assert truth.same(output, '{"a":true,"b":[1]}', "JSON") is same


def test_compares_other_answers_as_stripped_text() -> None:
    assert truth.same(" yes\n", "yes", "text")
    assert not truth.same("Yes", "yes", "text")


def test_score_that_is_not_finite_is_told() -> None:
    assert format_score(math.nan, 0.1) == "not finite"
    assert format_score(-math.inf, None) == "not finite"
    assert format_score(0.5, 0.25) == "0.500 ± 0.250"
    assert format_score(0.5, None) == "0.500"


def gap(**facts: Any) -> Difference:
    """Make a difference over 100 rows."""
    return cast(Difference, {"difference": 0.5, "stderr": 0.1, "n": 100, **facts})


@pytest.mark.parametrize(
    ("facts", "higher_is_better", "words"),
    [
        ({}, True, "better"),
        ({}, False, "worse"),
        ({"difference": -0.5}, False, "better"),
        ({"difference": -0.5}, True, "worse"),
        ({}, None, "higher"),
        ({"difference": -0.5}, None, "lower"),
        ({"stderr": 0.3}, True, "no difference measured"),
        ({"stderr": 0.0}, True, "better"),
        ({"stderr": None}, True, "no difference measured"),
        ({"difference": 0.0, "stderr": 0.0}, True, "no difference measured"),
        ({"n": 5}, True, "too few rows to tell"),
        ({"p": 0.2}, True, "no difference measured"),
        ({"p": 0.01, "stderr": 0.4}, True, "better"),
        ({"interval": (-0.1, 1.1)}, True, "no difference measured"),
        ({"interval": (0.1, 1.1), "stderr": 0.3}, True, "better"),
        ({"difference": None, "stderr": None}, True, "not finite"),
    ],
)
def test_verdict_says_what_was_measured(facts: dict[str, Any], higher_is_better: bool | None, words: str) -> None:
    assert verdict(gap(**facts), higher_is_better) == words


def test_formats_what_is_not_finite_in_words() -> None:
    assert format_score(None, None) == format_score(float("nan"), 0.1) == "not finite"
    assert format_difference(gap(difference=None, stderr=None)) == "not finite"
    assert (format_difference(gap()), format_difference(gap(difference=-0.5))) == ("+0.500 ± 0.100", "-0.500 ± 0.100")
    assert score([1.0, float("nan")])["value"] is None
