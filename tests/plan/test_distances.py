"""Sets of distances: what is in them, their words, their JSON, and draws that seed and step alone decide."""

import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from llmtune.errors import PlanError
from llmtune.plan.distances import Band, Chosen, Distances, Drawn, Everything, Top, read_distances, spans
from llmtune.plan.schedule import Schedule
from llmtune.plan.stages import Plan, Stage

BLOCKS = 30
ENDS = frozenset({0, BLOCKS + 1})
LISA = Drawn(2, 20, frozenset(range(1, BLOCKS + 1)), ENDS)


@pytest.mark.parametrize(
    ("distances", "inside", "farthest", "words"),
    [
        (Everything(), range(32), 31, "all layers"),
        (Top(0), [0], 0, "head and final norm"),
        (Top(1), [0, 1], 1, "the last block"),
        (Top(4), range(5), 4, "the last 4 blocks"),
        (Top(31), range(32), 31, "all layers"),
        (Band(5, 12), range(5, 13), 12, "blocks at distances 5 to 12"),
        (Band(5, 5), [5], 5, "the block at distance 5"),
        (Band(29, 31), [29, 30, 31], 31, "blocks at distances 29 to 30, embeddings"),
        (Band(31, 31), [31], 31, "embeddings"),
        (Chosen(frozenset({7, 1, 2})), [1, 2, 7], 7, "distances 1 to 2, 7"),
        (LISA, range(32), 31, "2 of 30 blocks, drawn anew every 20 steps"),
        (Drawn(1, 1, frozenset({1, 3}), frozenset()), [1, 3], 3, "1 of 2 blocks, drawn anew every step"),
    ],
    ids=str,
)
def test_set_has_members_words_and_json(distances: Distances, inside: Any, farthest: int, words: str) -> None:
    assert [distance for distance in range(32) if distance in distances] == list(inside)
    assert distances.farthest(BLOCKS) == farthest
    assert distances.words(BLOCKS) == words
    assert read_distances(json.loads(json.dumps(distances.to_json()))) == distances
    assert hash(distances) == hash(read_distances(distances.to_json()))
    assert distances.share(BLOCKS) == sum(1 <= distance <= BLOCKS for distance in inside) / BLOCKS


@pytest.mark.parametrize(("first", "last"), [(0, 3), (4, 3)])
def test_refuses_a_band_that_holds_nothing_or_the_head(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="trains nothing"):
        Band(first, last)


def test_refuses_a_negative_reach() -> None:
    with pytest.raises(ValueError, match="trains nothing; try a reach of 0"):
        Top(-1)


def drawn(seed: int = 0, steps: int = 2000) -> list[frozenset[int]]:
    """What is drawn at each step, without the ends that always train."""
    sets = [LISA.at(step, seed).distances for step in range(steps)]
    assert all(one >= ENDS for one in sets)
    return [one - ENDS for one in sets]


def test_draw_lasts_for_its_steps_and_has_its_size() -> None:
    sets = drawn()
    for start in range(0, len(sets), 20):
        assert len(set(sets[start : start + 20])) == 1
        assert len(sets[start]) == 2
    assert all(one in LISA for one in range(32))


def test_draws_are_even_over_the_blocks_and_change() -> None:
    sets = drawn(steps=20 * 3000)[::20]
    counts = [sum(distance in one for one in sets) for distance in range(1, BLOCKS + 1)]
    assert min(counts) > 140
    assert max(counts) < 265  # 200 expected, 14 is a standard deviation
    assert sum(one == other for one, other in pairwise(sets)) < 25


def test_another_seed_draws_other_blocks_and_the_same_seed_the_same() -> None:
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_draws_are_the_same_in_another_process() -> None:
    code = (
        "from llmtune.plan.distances import Drawn\n"
        "draw = Drawn(2, 20, frozenset(range(1, 31)), frozenset({0, 31}))\n"
        "print([sorted(draw.at(step, 3).distances) for step in range(0, 400, 20)])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == [sorted(LISA.at(step, 3).distances) for step in range(0, 400, 20)]


def test_draws_stay_what_earlier_versions_drew() -> None:
    assert [sorted(one) for one in drawn()[:100:20]] == [[20, 23], [5, 29], [2, 16], [12, 14], [16, 17]]


def test_draws_are_limited_to_where_tensors_are() -> None:
    top = LISA.limited_to({1, 2, 3})
    assert {distance for step in range(0, 400, 20) for distance in top.at(step, 0).distances - ENDS} == {1, 2, 3}
    assert Top(4).limited_to({1}) == Top(4)
    with pytest.raises(PlanError, match="draws 2 blocks, and the adapter is in 1; try 1") as caught:
        LISA.limited_to({1, 40})
    assert caught.value.key == "blocks"


def test_most_is_what_trains_at_one_time() -> None:
    sizes = {0: 1, 1: 10, 2: 30, 3: 20, 31: 5}
    assert LISA.most(sizes) == 1 + 5 + 30 + 20
    assert Top(2).most(sizes) == 41
    assert Chosen(frozenset({3})).most(sizes) == 20


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_drawn_block_follows_the_schedule_without_a_second_warm_up(shape: Any) -> None:
    schedule = Schedule(Plan((Stage(1.0, LISA, 1e-3),)), 200, 0.2, shape, seed=5)
    for step in range(200):
        now = LISA.at(step, 5)
        for distance in range(32):
            assert schedule.rate(step, distance) == (schedule.rate(step, 0) if distance in now else 0.0)
    assert schedule.rate(0, 0) == pytest.approx(1e-3 / 40)
    ever = {distance for step in range(200) for distance in LISA.at(step, 5).distances}
    assert {distance for distance in range(32) if schedule.ever_trains(distance)} == ever
    assert len(ever) < 32


def test_drawn_plan_is_staged() -> None:
    plan = Plan((Stage(1.0, LISA, 1.0),))
    assert (plan.staged, plan.redrawn) == (True, True)
    assert not Plan((Stage(1.0, Top(2), 1.0),)).redrawn
    assert [plan.peak(distance) for distance in (0, 17, 31)] == [1.0] * 3


def test_spans_read_as_people_write_them() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"


def test_tells_how_often_a_rate_moves_a_distance() -> None:
    plan = Plan((Stage(0.5, Top(0), 1e-3, 1.0), Stage(1.0, Top(1), 1e-3, 1.0)))
    schedule = Schedule(plan, 4)
    assert [schedule.moves(0, times) for times in (1, 4, 5)] == [True, True, False]
    assert [schedule.moves(1, times) for times in (1, 2, 3)] == [True, True, False]
    assert not schedule.moves(2, 1)
