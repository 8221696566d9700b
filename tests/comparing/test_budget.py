"""The minutes of a comparison, shared out, and the arms of a file."""

from pathlib import Path

import pytest

from llmtune.comparing.arms import read_arms
from llmtune.comparing.budget import (
    Costs,
    Shares,
    check_minutes,
    checkpoints_at,
    count_validations,
    steps_in,
    training_seconds,
    trial_steps,
    validation_rows,
)
from llmtune.comparing.entrants.session import Session
from llmtune.errors import RecipeError
from llmtune.recipe.sections import Recipe

COSTS = Costs(start=8, load=2, evaluation=10, base=20, step=1)


def test_shares_minutes_out() -> None:
    assert training_seconds(308, 2, COSTS) == pytest.approx((300 * 2 / 3 - 2 * 12) / 2)
    assert training_seconds(1, 2, COSTS) == 8  # never fewer than the fewest steps
    assert steps_in(20, 1.5, 100) == (13, False)
    assert steps_in(20, 0.1, 100) == (100, True)
    assert trial_steps(100, 1, 2, 50) == 23  # four trials
    assert trial_steps(30, 1, 2, 50) == 13  # two trials
    assert trial_steps(27, 1, 2, 50) == 0  # a second trial would be too short to tell
    assert trial_steps(100, 1, 2, 400) == 0
    assert trial_steps(100, 1, 2, 6) == 6
    assert checkpoints_at(18, 6) == [3, 6, 9, 12, 15, 18]
    assert checkpoints_at(4, 6) == [1, 2, 3, 4]
    assert (validation_rows(60, 3, 8), validation_rows(1000, 1, 16), validation_rows(300, 1, 2)) == (16, 64, 30)
    assert (count_validations(18, 8, 16), count_validations(500, 16, 64), count_validations(4, 8, 16)) == (2, 6, 2)


def test_names_minutes_that_work() -> None:
    least = COSTS.least(2)
    assert least == 8 + 2 * (2 + 8 + 10)
    five = Shares(arms=5, scratch=False, sizes=1, seeds=2)
    with pytest.raises(RecipeError, match="is too little for 5 arms with 2 seeds; the nearest that works is") as caught:
        check_minutes(3, 30, five, COSTS)
    words = float(str(caught.value).rsplit(" ", 1)[1])
    check_minutes(words, 30, five, COSTS)
    check_minutes(3, 30, five, COSTS, slots=3)


def test_names_what_the_minutes_are_for() -> None:
    assert Shares(1, True, 1, 2).words == "an arm and the scratch baseline with 2 seeds"
    assert (Shares(3, True, 2, 1).words, Shares(3, True, 2, 1).entrants) == (
        "3 arms and the scratch baseline at 2 sizes with 1 seed",
        8,
    )
    assert Shares(0, True, 1, 1).words == "the scratch baseline with 1 seed"
    check_minutes(0.0, 0, Shares(0, False, 1, 1), COSTS)  # nothing trains


def test_reads_arms_of_a_file_as_overrides(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text(
        "- lora\n"
        "- {name: top half, set: {method: {kind: frozen, adapter: {kind: lora}}, train.batch_size: 2}}\n"
        "- {name: slow, set: {method.lr: 1.0e-5, train: {warmup: 0.2, schedule: linear}}}\n"
    )
    lora, top, slow = read_arms([str(file)])
    assert (lora.name, lora.set) == ("lora", ("method=lora",))
    assert top.set == ("method={kind: frozen, adapter: {kind: lora}}", "train.batch_size=2")
    assert slow.set == ("method.lr=1.0e-05", "train.warmup=0.2", "train.schedule=linear")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {base: a/b}\ndata: {train: rows.jsonl}\nmethod: full\n")
    loaded = Recipe.load(recipe, [*top.set, *slow.set])
    assert (loaded.method.adapter.kind, loaded.train.schedule) == ("lora", "linear")


def test_entrant_has_the_steps_of_the_plan(recipe: Path) -> None:
    session = Session(Recipe.load(recipe, ["train.epochs=1.2"]), 16)
    assert session.most_steps == session.table(session.recipe).steps == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: lora\n", "arms.yaml:1: holds sections; a list of arms such as"),
        ("[]\n", "arms.yaml:1: names no arm"),
        ("- lora\n- {name: lora, set: {}}\n", r"arms.yaml:2: 1: an arm has the name lora already, at .*arms.yaml:1"),
        ("- {name: a/b, set: {}}\n", "arms.yaml:1: 0.name: 'a/b' names a folder: letters"),
        ("- {name: scratch}\n", "'scratch' is the name of a baseline"),
        ("- {name: x, sets: {}}\n", "arms.yaml:1: 0.sets: is no key of an arm; did you mean 'set'"),
        ("- loar\n", "arms.yaml:1: 0: an arm has a name and what it sets"),
        ("- {name: x, set: [a]}\n", "arms.yaml:1: 0.set: sets values of the recipe by their keys"),
    ],
)
def test_names_file_and_line_of_a_wrong_arm(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_arms([str(file)])
