"""Means and differences of arms: hand-computed errors, intervals that hold the truth, and corrected p-values."""

import math

import numpy
import pytest

from llmtune.arms.scores import Sample, gap, holm, mean, rows_to_tell, sample, seed_variance
from llmtune.evaluation.metrics import mcnemar


def test_mean_of_one_training_has_the_error_of_its_rows() -> None:
    one = sample([[1, 0, 0, 1, None]])
    stderr = math.sqrt(4 * 0.25 / 3 / 4)
    assert mean(one, None) == {"value": 0.5, "stderr": pytest.approx(stderr), "n": 4, "seeds": 1}
    losses = sample([[2.0, 6.0]], [1, 3])
    assert mean(losses, None)["value"] == 2.0
    assert mean(losses, None)["stderr"] == 0.0
    assert mean(sample([[None, None]]), None)["value"] is None


def test_variance_between_seeds_is_pooled_and_adds_to_that_of_rows() -> None:
    """Two seeds whose rows all move together: the seeds' means 0.2 and 0.4 have variance 0.02, and no rest."""
    one = sample([[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]])
    between = seed_variance([one, sample([[1, 0, 1]])])
    assert between == {"value": pytest.approx(0.02), "freedom": 1}
    assert mean(one, between)["stderr"] == pytest.approx(math.sqrt(0.01 / 3 + 0.02 / 2))
    assert seed_variance([sample([[1, 0, 1]])]) is None
    fixed = sample([[0, 0, 1]], is_trained=False)
    assert mean(fixed, between)["stderr"] == mean(fixed, None)["stderr"]


def test_difference_is_paired_by_row() -> None:
    new, old = sample([[1, 1, 1, 1, 1, 1, 1, 0, 0, None]]), sample([[0, 0, 0, 0, 0, 0, 1, 0, 1, 1]])
    found = gap(new, old, None)
    assert found["difference"] == pytest.approx(5 / 9)
    assert found["n"] == 9
    assert found["p"] == mcnemar(6, 1)
    assert found["could_tell"] == math.ceil(7.84 * (7 / 9) / (5 / 9) ** 2)
    with pytest.raises(ValueError, match="same rows"):
        gap(new, sample([[1]]), None)


def test_rows_that_could_tell() -> None:
    """The figures of the power formula: 5 points at a disagreement of 0.2 need 627 rows, 2 points 3,920."""
    assert rows_to_tell(0.05, 0.2) == 628
    assert rows_to_tell(-0.02, 0.2) == 3920
    assert rows_to_tell(0.0, 0.2) is None
    assert rows_to_tell(0.05, 0.2, of_seeds=0.001) is None


def test_holm_counts_every_comparison() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("between_seeds", [0.0, 0.05])
def test_intervals_hold_the_true_difference(between_seeds: float) -> None:
    """Of 400 simulated pairs among four arms with two seeds, about 95% hold the truth; rows alone would hold fewer."""
    generator = numpy.random.default_rng(3)
    held, held_by_rows = 0, 0
    for _ in range(400):
        hard = generator.normal(0, 0.4, 60)
        arms = [
            Sample(
                hard
                + generator.normal(0, 0.2, 60)
                + 0.1 * index
                + generator.normal(0, between_seeds, (2, 1))
                + generator.normal(0, 0.1, (2, 60)),
                numpy.ones(60),
            )
            for index in range(4)
        ]
        for between, count in ((seed_variance(arms), "both"), (None, "rows")):
            low, high = gap(arms[1], arms[0], between)["interval"]
            held += count == "both" and low <= 0.1 <= high
            held_by_rows += count == "rows" and low <= 0.1 <= high
    assert 0.92 <= held / 400 <= 0.985
    if between_seeds:
        assert held_by_rows / 400 < 0.85
