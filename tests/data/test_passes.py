"""Passes of a step: each row in one pass of one process, within the limits, and evenly dealt."""

import random
from math import ceil

import pytest

from llmtune.data.batches.order import EpochSampler, order
from llmtune.data.batches.passes import PassLimits, rows_per_pass, split
from llmtune.training.passes.steps import PassRows, StepSampler

LIMITS = [PassLimits(rows, tokens) for rows in (None, 1, 3) for tokens in (None, 7, 40, 1_000)]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_row_is_in_one_pass_within_the_limits(limits: PassLimits, world: int) -> None:
    draw = random.Random(0)
    for count in [*range(1, 12), 40]:
        lengths = [draw.randint(1, 30) for _ in range(count)]
        passes = split(lengths, limits, world)
        assert sorted(row for shares in passes for rows in shares for row in rows) == list(range(count))
        for number, shares in enumerate(passes):
            assert len(shares) == world
            assert all(shares) or number == len(passes) - 1, "a process without a row before the last pass"
            for rows in filter(None, shares):
                assert limits.rows is None or len(rows) <= limits.rows
                padded = len(rows) * max(lengths[row] for row in rows)
                assert limits.tokens is None or padded <= limits.tokens or len(rows) == 1


def test_processes_have_about_as_many_tokens() -> None:
    draw = random.Random(1)
    lengths = sorted(draw.randint(10, 500) for _ in range(64))
    for limits in (PassLimits(), PassLimits(4), PassLimits(tokens=1_024)):
        sums = [0, 0, 0, 0]
        for shares in split(lengths, limits, 4):
            for rank, rows in enumerate(shares):
                sums[rank] += sum(lengths[row] for row in rows)
        assert max(sums) / min(sums) < 1.05


def test_rows_stay_in_order_where_they_fit() -> None:
    lengths = [3, 9, 1, 5, 8]
    assert split(lengths, PassLimits(2, 18)) == [[[0, 1]], [[2, 3]], [[4]]]
    assert split(lengths, PassLimits(2, 17)) == [[[1]], [[4, 3]], [[0, 2]]]
    assert split(lengths, PassLimits(tokens=20)) == [[[1, 4]], [[3, 0, 2]]]


def test_rows_of_a_pass_are_limited_on_cpus_alone_unless_a_recipe_limits_them() -> None:
    assert [rows_per_pass(share, None, on_cpu=True) for share in (1, 7, 8, 12, 16, 22)] == [1, 7, 8, 6, 8, 2]
    assert rows_per_pass(16, None, on_cpu=False) is None
    assert [rows_per_pass(16, 4, on_cpu) for on_cpu in (False, True)] == [4, 4]


def test_processes_agree_on_passes_and_tokens_and_share_an_epochs_rows() -> None:
    draw, world, share = random.Random(2), 3, 2
    lengths = [draw.randint(2, 20) for _ in range(19)]
    data = [{"input_ids": [1] * length, "labels": [-100] + [1] * (length - 1)} for length in lengths]
    limits, batch = PassLimits(tokens=24), world * share
    epochs = [
        list(StepSampler(data, EpochSampler(lengths, batch, 5, True), limits, share, rank, world))
        for rank in range(world)
    ]
    expected = order(lengths, batch, 5, 0, True)
    for number, steps in enumerate(zip(*epochs, strict=True)):
        assert len({len(passes) for passes in steps}) == 1
        rows = [row for passes in steps for each in passes for row in each.rows]
        assert sorted(rows) == sorted(expected[batch * number : batch * (number + 1)])
        for passes in steps:
            assert sum(each.supervised for each in passes) == sum(lengths[row] - 1 for row in rows)
    assert len(epochs[0]) == ceil(19 / batch)
    idle = epochs[1][-1][-1]
    assert not idle.rows or not epochs[2][-1][-1].rows, "19 rows leave one for the last step of three processes"
    rows_of_pass = PassRows(data, lambda rows: {"labels": [row["labels"] for row in rows]})
    labels = [rows_of_pass[each][0]["labels"] for steps in epochs for each in steps[-1]]
    assert sum(own == [[-100] * lengths[0]] for own in labels) == 2
