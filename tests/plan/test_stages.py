"""The plan against the same rates computed another way."""

import itertools
import math
from typing import Any

import pytest

from llmtune.plan.distances import Everything, Top
from llmtune.plan.schedule import Over, Schedule, Shape
from llmtune.plan.stages import Plan, Stage, boundaries, decay_for

BLOCKS = 6
ONE = Plan((Stage(1.0, Everything(), 1e-3),))
THREE = Plan((Stage(0.25, Top(0), 4e-3, 0.7), Stage(0.5, Top(2), 2e-3, 0.8), Stage(1.0, Everything(), 1e-3, 0.9)))
STEADY = Plan((Stage(0.25, Top(0), 1e-3, 0.9), Stage(0.5, Top(2), 1e-3, 0.9), Stage(1.0, Everything(), 1e-3, 0.9)))


def by_hand(
    plan: Plan, steps: int, warmup_steps: int, shape: Shape, starts: tuple[int, ...] = (0,)
) -> list[list[float]]:
    """Rates of every step and distance, with logarithms for powers, a squared cosine and counted warm-up steps.

    Warm-up and shape begin at each of `starts`.
    """
    table = []
    for step in range(steps):
        if step in starts:
            trained = [0] * (BLOCKS + 2)
            length = min(start for start in (*starts, steps) if start > step) - step
            first, rises = step, math.ceil(round(warmup_steps * length / steps, 6))
        stage = next(stage for stage in plan.stages if step < round(stage.until * steps))
        row = []
        for distance in range(BLOCKS + 2):
            if distance not in stage.trains:
                row.append(0.0)
                continue
            trained[distance] += 1
            rise = min(trained[distance], rises) / rises if rises else 1.0
            done = max(step - first - rises, 0) / max(length - rises, 1)
            fall = {"constant": 1.0, "linear": 1 - done, "cosine": math.cos(done * math.pi / 2) ** 2}[shape]
            row.append(math.exp(math.log(stage.lr) + distance * math.log(stage.decay)) * rise * fall)
        table.append(row)
    return table


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize(
    ("plan", "over", "starts"),
    [
        (ONE, "run", (0,)),
        (ONE, "stage", (0,)),
        (THREE, "run", (0,)),
        (STEADY, "run", (0,)),
        (STEADY, "stage", (0, 25, 50)),
    ],
)
def test_rates_equal_the_closed_form(
    plan: Plan, over: Over, starts: tuple[int, ...], warmup_steps: int, shape: Shape
) -> None:
    laid = Schedule(plan, 100, warmup_steps / 100, shape, over=over)
    expected = by_hand(plan, 100, warmup_steps, shape, starts)
    assert laid.warmup_steps == warmup_steps
    for step, distance in itertools.product(range(100), range(BLOCKS + 2)):
        assert laid.rate(step, distance) == pytest.approx(expected[step][distance], rel=1e-12, abs=0), (step, distance)


def test_warms_up_a_newly_trained_distance_from_its_first_step() -> None:
    laid = Schedule(STEADY, 100, 0.1)
    assert [laid.first_step(distance) for distance in (0, 1, 2, 3, BLOCKS + 1)] == [0, 25, 25, 50, 50]
    for distance in (0, 2, 3):
        start = laid.first_step(distance) or 0
        peak = STEADY.peak(distance)
        assert [laid.rate(step, distance) for step in range(start)] == [0.0] * start
        rise = [laid.rate(start + step, distance) / peak for step in range(12)]
        assert rise == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_no_rate_jumps_at_a_boundary_unless_the_stages_say_so(shape: Shape) -> None:
    steps, warmup = 1000, 0.05
    fastest = math.pi / 2 / (steps * (1 - warmup)) + 1 / (warmup * steps)
    laid = Schedule(STEADY, steps, warmup, shape)
    for step, distance in itertools.product(range(1, steps), range(BLOCKS + 2)):
        change = abs(laid.rate(step, distance) - laid.rate(step - 1, distance))
        assert change <= fastest * STEADY.peak(distance), (step, distance)
    declared = Schedule(THREE, steps, warmup, "constant")
    assert declared.rate(249, 0) == pytest.approx(4e-3)
    assert declared.rate(250, 0) == pytest.approx(2e-3)


def test_rises_at_once_and_never_ends_at_nothing() -> None:
    shapes: tuple[Shape, ...] = ("cosine", "linear", "constant")
    for shape, warmup in itertools.product(shapes, (0.0, 0.03, 0.99)):
        laid = Schedule(ONE, 40, warmup, shape)
        assert all(laid.rate(step, 0) > 0 for step in range(40)), (shape, warmup)
        assert max(laid.rate(step, 0) for step in range(40)) <= 1e-3
    assert Schedule(ONE, 40, 0.0, "cosine").rate(40, 0) == pytest.approx(0.0, abs=1e-18)
    assert Schedule(ONE, 40, 0.0, "linear").rate(45, 0) == 0.0


def test_warm_up_is_a_whole_number_of_steps() -> None:
    assert Schedule(ONE, 100, 0.07).warmup_steps == 7
    assert Schedule(ONE, 100, 0.071).warmup_steps == 8
    assert Schedule(ONE, 100, 0.0).warmup_steps == 0


def test_starts_are_the_rounded_ends_of_the_stages_before() -> None:
    assert Schedule(THREE, 100).starts == [0, 25, 50]
    assert Schedule(THREE, 10).starts == [0, 2, 5]
    laid = Schedule(Plan((Stage(1 / 3, Top(0), 1.0), Stage(2 / 3, Top(4), 1.0), Stage(1.0, Everything(), 1.0))), 10)
    assert laid.starts == [0, 3, 7]
    assert [laid.stage_at(step) for step in (0, 2, 3, 6, 7, 9, 10, 99)] == [0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(("plan", "fewest"), [(ONE, 1), (THREE, 3)])
def test_refuses_too_few_steps_for_the_stages(plan: Plan, fewest: int) -> None:
    laid = Schedule(plan, fewest)
    assert sorted({laid.stage_at(step) for step in range(fewest)}) == list(range(len(plan.stages)))
    with pytest.raises(ValueError, match=f"{fewest - 1} steps cannot hold {len(plan.stages)} stages"):
        Schedule(plan, fewest - 1)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_trains_a_single_step_at_the_full_rate(shape: Shape, warmup: float) -> None:
    assert Schedule(ONE, 1, warmup, shape).rate(0, 0) == 1e-3


@pytest.mark.parametrize("blocks", [2, 3, 12, 30, 80])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 1.0])
def test_decay_for_gives_the_bottom_ratio_between_the_first_and_the_last_block(blocks: int, ratio: float) -> None:
    stage = Stage(1.0, Everything(), 3e-4, decay_for(ratio, blocks))
    assert stage.rate(blocks) / stage.rate(1) == pytest.approx(ratio, rel=1e-12)
    assert decay_for(ratio, 1) == 1.0


def test_peak_is_the_highest_stage_rate_and_staged_means_that_the_set_changes() -> None:
    assert [THREE.peak(distance) for distance in (0, 1, 2)] == [4e-3, 2e-3 * 0.8, pytest.approx(2e-3 * 0.64)]
    assert THREE.peak(3) == pytest.approx(1e-3 * 0.9**3)
    assert THREE.staged
    top = Plan((Stage(0.5, Top(3), 1.0), Stage(1.0, Top(2), 1.0)))
    assert (top.staged, top.peak(3), top.peak(4)) == (True, 1.0, 0.0)
    assert not Plan((Stage(0.5, Top(2), 1.0), Stage(1.0, Top(2), 0.1))).staged


def test_no_second_warm_up_for_a_distance_that_was_frozen_in_between() -> None:
    laid = Schedule(Plan((Stage(0.3, Top(3), 1.0), Stage(0.6, Top(1), 1.0), Stage(1.0, Top(3), 1.0))), 100, 0.1)
    assert laid.rate(29, 3) == 1.0
    assert [laid.rate(step, 3) for step in (30, 45, 59)] == [0.0, 0.0, 0.0]
    assert laid.rate(60, 3) == 1.0


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ((0.0, Everything(), 1.0), "fraction"),
        ((1.1, Everything(), 1.0), "fraction"),
        ((float("nan"), Everything(), 1.0), "fraction"),
        ((1.0, Everything(), 0.0), "positive"),
        ((1.0, Everything(), -1.0), "positive"),
        ((1.0, Everything(), float("nan")), "positive"),
        ((1.0, Everything(), float("inf")), "positive"),
        ((1.0, Everything(), 1.0, 0.0), "decay"),
        ((1.0, Everything(), 1.0, 1.6), "decay"),
    ],
)
def test_refuses_a_stage_that_makes_no_sense(fields: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Stage(*fields)


@pytest.mark.parametrize("ends", [(), (0.5,), (0.5, 0.5, 1.0), (0.6, 0.5, 1.0)])
def test_refuses_stages_that_do_not_fill_the_training(ends: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="the last at 1"):
        Plan(tuple(Stage(end, Everything(), 1.0) for end in ends))


def test_boundaries_lie_below_everything_that_has_trained() -> None:
    everything = range(6)
    plan = Plan((Stage(0.3, Top(0), 1), Stage(0.6, Top(2), 1), Stage(1.0, Everything(), 1)))
    assert boundaries(plan, everything, 4) == [4, 2, 0]
    assert boundaries(plan, [3, 1, 0], 4) == [4, 3, 1]
    narrowing = Plan((Stage(0.3, Top(1), 1), Stage(0.6, Everything(), 1), Stage(1.0, Top(1), 1)))
    assert boundaries(narrowing, everything, 4) == [3, 0, 0]
