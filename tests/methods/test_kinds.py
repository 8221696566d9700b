"""Methods give the plans that their definitions say, at rates that suit adapter and model size."""

import itertools
import math
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from llmtune.errors import PlanError
from llmtune.methods.kinds import METHODS, Method
from llmtune.plan.distances import Band, Drawn, Everything, Top
from llmtune.plan.stages import Facts, Plan, Stage, decay_for
from tests.support import ROOT

SMALL = Facts(blocks=30, hidden=576, parameters=134_515_008)
LARGE = Facts(blocks=32, hidden=4096, parameters=8_030_261_248)
LINES: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen": {"reach": 0.25, "decay": 0.9},
    "gradual": {"reaches": [2, 0.5, "all"], "bottom_ratio": 0.1},
    "discriminative": {},
    "staged": {"stages": [{"until": 0.5, "reach": 1}, {"until": 1, "reach": "all", "bottom_ratio": 0.2}]},
    "lisa": {"blocks": 3, "every": 5},
}
ADAPTERS: list[Any] = [
    "none",
    {"kind": "none"},
    {"kind": "lora"},
    {"kind": "lora", "rank": 64, "alpha": 8, "rslora": True, "dora": True, "init": "pissa"},
    {"kind": "ia3"},
    {"kind": "bottleneck", "form": "sequential"},
    {"kind": "vera"},
]


def method(kind: str, **keys: Any) -> Any:
    """A validated method."""
    return TypeAdapter(Method).validate_python({"kind": kind, **keys})


def plan_error(facts: Facts, kind: str, **keys: Any) -> PlanError:
    """The error that a method's plan ends in."""
    with pytest.raises(PlanError) as caught:
        method(kind, **keys).plan(facts)
    return caught.value


def validation_error(kind: str, **keys: Any) -> PlanError:
    """The error of the project's own that a method's validation ends in."""
    with pytest.raises(ValidationError) as caught:
        method(kind, **keys)
    error = caught.value.errors()[0]["ctx"]["error"]
    assert isinstance(error, PlanError)
    return error


def test_lists_every_kind_of_the_union() -> None:
    kinds = [get_args(option.model_fields["kind"].annotation)[0] for option in get_args(get_args(Method)[0])]
    assert sorted(kinds) == sorted(METHODS) == sorted(LINES)


@pytest.mark.parametrize("kind", METHODS)
def test_finds_file_words_and_documents_of_every_method(kind: str) -> None:
    assert METHODS[kind].__module__ == f"llmtune.methods.{kind}"
    assert METHODS[kind].why.endswith(".")
    rows = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    assert any(row.startswith(f"| `{kind}` |") for row in rows), f"docs/methods.md has no row for {kind}"


@pytest.mark.parametrize(("kind", "adapter"), itertools.product(LINES, ADAPTERS), ids=str)
@pytest.mark.parametrize("facts", [SMALL, LARGE, Facts(12, 64, 1000)], ids=["small", "large", "tiny"])
def test_resolved_writes_every_rate_out_and_changes_no_plan(kind: str, adapter: Any, facts: Facts) -> None:
    loose = method(kind, adapter=adapter, **LINES[kind])
    fixed = loose.resolved(facts)
    assert type(fixed) is type(loose)
    assert fixed.plan(facts) == loose.plan(facts)
    assert fixed.resolved(facts) == fixed
    again = TypeAdapter(Method).validate_json(fixed.model_dump_json())
    assert again == fixed
    written = [stage.lr for stage in fixed.stages] if kind == "staged" else fixed.lr
    written = list(written) if isinstance(written, tuple | list) else [written]
    assert written == [stage.lr for stage in loose.plan(facts).stages]
    elsewhere = Facts(facts.blocks, facts.hidden, facts.parameters * 1000)
    assert [stage.lr for stage in fixed.plan(elsewhere).stages] == written


def test_keeps_the_rate_of_the_recipe() -> None:
    assert method("full", lr=0.5).resolved(SMALL) == method("full", lr=0.5)
    assert method("gradual", reaches=[1, 2], lr=0.5).resolved(SMALL).lr == (0.5, 0.5)
    assert method("gradual", reaches=[1, 2], lr=[0.5, 0.25]).plan(SMALL).stages[1].lr == 0.25


def test_writes_the_default_bottom_ratio_unless_a_factor_is_set() -> None:
    assert method("discriminative").resolved(SMALL).bottom_ratio == 0.1
    given = method("discriminative", decay=0.9).resolved(SMALL)
    assert (given.decay, given.bottom_ratio) == (0.9, None)


def test_full_is_one_stage_over_everything() -> None:
    assert method("full", lr=1e-4).plan(SMALL) == Plan((Stage(1.0, Everything(), 1e-4),))


def test_frozen_is_one_stage_over_the_top() -> None:
    assert method("frozen", reach=4, lr=1e-4).plan(SMALL) == Plan((Stage(1.0, Top(4), 1e-4),))
    assert method("frozen", reach=0, lr=1e-4).plan(SMALL).stages[0].trains == Top(0)
    assert method("frozen", reach="all", lr=1e-4).plan(SMALL).stages[0].trains == Everything()


def test_gradual_is_one_stage_a_reach_over_equal_spans() -> None:
    plan = method("gradual", reaches=[0, 4, "all"], lr=1e-4).plan(SMALL)
    assert plan == Plan((Stage(1 / 3, Top(0), 1e-4), Stage(2 / 3, Top(4), 1e-4), Stage(1.0, Everything(), 1e-4)))
    uneven = method("gradual", reaches=[0, "all"], until=[0.1, 1], lr=1e-4).plan(SMALL)
    assert [stage.until for stage in uneven.stages] == [0.1, 1.0]


@pytest.mark.parametrize("facts", [SMALL, LARGE])
def test_discriminative_rates_fall_to_a_tenth_at_any_depth(facts: Facts) -> None:
    (stage,) = method("discriminative", lr=1e-4).plan(facts).stages
    assert stage.rate(facts.blocks) / stage.rate(1) == pytest.approx(0.1)
    assert stage.decay == decay_for(0.1, facts.blocks)


def test_ulmfit_is_gradual_with_falling_rates() -> None:
    plan = method("gradual", reaches=[1, "all"], decay=1 / 2.6, lr=1e-2).plan(SMALL)
    assert plan.stages[1].rate(3) == pytest.approx(1e-2 / 2.6**3)


def test_staged_takes_the_stages_as_they_are() -> None:
    stages = [{"until": 0.25, "reach": 2, "lr": 1e-3, "decay": 0.5}, {"until": 1.0, "reach": 0, "lr": 1e-4}]
    plan = method("staged", stages=stages).plan(SMALL)
    assert plan == Plan((Stage(0.25, Top(2), 1e-3, 0.5), Stage(1.0, Top(0), 1e-4)))


def test_staged_stage_can_leave_the_top_frozen() -> None:
    stages = [{"until": 0.5, "nearest": 5, "reach": 12, "lr": 1e-3}, {"until": 1.0, "nearest": 1, "lr": 1e-4}]
    plan = method("staged", stages=stages).plan(SMALL)
    assert plan == Plan((Stage(0.5, Band(5, 12), 1e-3), Stage(1.0, Band(1, 31), 1e-4)))
    error = plan_error(SMALL, "staged", stages=[{"until": 1, "nearest": 9, "reach": 0.1}])
    assert (error.key, str(error)) == ("stages.0.nearest", "9 lies beyond the stage's reach; try 3")


def test_lisa_draws_blocks_and_always_trains_the_ends() -> None:
    plan = method("lisa", lr=1e-4).plan(SMALL)
    assert plan == Plan((Stage(1.0, Drawn(2, 20, frozenset(range(1, 31)), frozenset({0, 31})), 1e-4),))
    assert method("lisa").plan(SMALL).stages[0].lr == method("full").plan(SMALL).stages[0].lr


def test_refuses_lisa_with_more_blocks_than_the_model_has() -> None:
    error = plan_error(SMALL, "lisa", blocks=31)
    assert (error.key, str(error)) == ("blocks", "31 is more than the model's 30 blocks; try 30")


@pytest.mark.parametrize(
    ("reach", "blocks", "expected"),
    [
        (0.5, 30, Top(15)),
        (0.15, 30, Top(5)),
        (0.1, 30, Top(3)),
        (0.07, 100, Top(7)),
        (0.01, 2, Top(1)),
        (0.99, 2, Top(2)),
        (3, 2, Everything()),
        (2, 2, Top(2)),
    ],
)
def test_rounds_a_share_of_the_blocks_up(reach: float, blocks: int, expected: Any) -> None:
    assert method("frozen", reach=reach).plan(Facts(blocks, 64, 1000)).stages[0].trains == expected


def test_refuses_a_reach_beyond_the_model_and_names_the_nearest() -> None:
    error = plan_error(SMALL, "frozen", reach=32)
    assert error.key == "reach"
    assert "which has 30 blocks; try 30" in str(error)
    assert plan_error(SMALL, "gradual", reaches=[1, 40, "all"]).key == "reaches.1"
    assert plan_error(SMALL, "staged", stages=[{"until": 1, "reach": 99}]).key == "stages.0.reach"


@pytest.mark.parametrize(("reaches", "place"), [([4, 4], 1), ([1, 4, 2], 2), ([0.5, 15, "all"], 1), (["all", 31], 1)])
def test_refuses_a_gradual_stage_that_reaches_no_farther(reaches: list[Any], place: int) -> None:
    error = plan_error(SMALL, "gradual", reaches=reaches)
    assert error.key == f"reaches.{place}"
    assert f"not {reaches[place]} after {reaches[place - 1]}" in str(error)


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("until.1", {"kind": "gradual", "reaches": [1, 2], "until": [0.5, 0.9]}),
        ("until.1", {"kind": "gradual", "reaches": [1, 2, 3], "until": [0.5, 0.5, 1.0]}),
        ("until", {"kind": "gradual", "reaches": [1, 2], "until": [1.0]}),
        ("lr", {"kind": "gradual", "reaches": [1, 2], "lr": [1.0, 2.0, 3.0]}),
        ("decay", {"kind": "gradual", "decay": 0.9, "bottom_ratio": 0.1}),
        ("decay", {"kind": "staged", "stages": [{"until": 1, "decay": 0.9, "bottom_ratio": 0.1}]}),
        ("stages.0.until", {"kind": "staged", "stages": [{"until": 0.9}]}),
        ("stages.1.until", {"kind": "staged", "stages": [{"until": 0.9}, {"until": 0.9}, {"until": 1.0}]}),
    ],
)
def test_refuses_what_contradicts_itself_at_its_key(key: str, keys: dict[str, Any]) -> None:
    assert validation_error(**keys).key == key


def test_top_alone_learns_faster_than_everything() -> None:
    head = method("frozen", reach=0).plan(SMALL).stages[0].lr
    half = method("frozen", reach=15).plan(SMALL).stages[0].lr
    everything = method("full").plan(SMALL).stages[0].lr
    assert (head, everything) == (pytest.approx(10 * everything), 3e-4)
    assert half == pytest.approx(everything * 10**0.5, rel=0.03)
    staged = [stage.lr for stage in method("gradual", reaches=[0, 15, "all"]).plan(SMALL).stages]
    assert staged == [head, half, everything]


def test_decay_raises_the_top_so_that_blocks_learn_as_fast_in_the_geometric_mean() -> None:
    falling = method("discriminative").plan(SMALL).stages[0]
    rates = [falling.rate(distance) for distance in range(SMALL.blocks + 2)]
    mean = math.prod(rates[1:-1]) ** (1 / SMALL.blocks)
    assert mean == pytest.approx(method("full").plan(SMALL).stages[0].lr, rel=0.1)
    steeper = method("discriminative", bottom_ratio=1e-3).plan(SMALL).stages[0]
    assert steeper.lr == pytest.approx(falling.lr, rel=0.02)
    lora = {"adapter": {"kind": "lora"}}
    assert method("discriminative", **lora).plan(SMALL).stages[0].lr == method("full", **lora).plan(SMALL).stages[0].lr


def test_refuses_to_change_a_method() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        method("full").lr = 1.0
