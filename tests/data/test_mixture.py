"""Mixtures of sources: the sizes that fractions give, which rows are drawn, and what is told of them."""

import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtune import recipe
from llmtune.data.gate import Gate, gate, split_rows
from llmtune.data.mixture import count_shared, draw, sizes
from llmtune.errors import RecipeError
from llmtune.files import read_json
from llmtune.reporting.page import render
from llmtune.run_log import read_log
from llmtune.training.loop import train
from llmtune.training.prepare import examine, outline, plan_alone, prepare
from tests.support import tiny


def sources(folder: Path, *parts: tuple[str, float, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mixture of a recipe, on files with these names, fractions and rows."""
    return [
        {"source": str(tiny.write_rows(folder / name, rows)), "fraction": fraction} for name, fraction, rows in parts
    ]


def load(folder: Path, mixture: list[dict[str, Any]], seed: int = 0, **data: Any) -> recipe.Recipe:
    """A recipe on a mixture."""
    sections = {"data": {"train": mixture, "max_length": 64, **data}, "train": {"seed": seed}}
    return recipe.load(tiny.write_recipe(folder / "recipe.yaml", Path("base"), Path("unused"), **sections))


def check(loaded: recipe.Recipe) -> Gate:
    """The checked data of a recipe."""
    return gate(loaded, tiny.tokenizer(), {2})


def test_is_as_large_as_no_source_is_oversampled() -> None:
    assert sizes([90, 20], [0.9, 0.1]) == [90, 10]
    assert sizes([1000, 30], [0.9, 0.1]) == [270, 30]  # in floats, 30 / 0.1 * 0.1 is over 30
    assert sizes([10, 10, 10], [0.3333333] * 3) == [10, 10, 10]
    assert sizes([7], [1.0]) == [7]
    for counts, fractions in product(product(range(1, 8), repeat=3), [(0.5, 0.3, 0.2), (0.98, 0.01, 0.01)]):
        given = sizes(counts, fractions)
        total = sum(given)
        assert all(size <= count for size, count in zip(given, counts, strict=True))
        assert all(abs(size - total * share) < 1 for size, share in zip(given, fractions, strict=True))
        one_more = [(total + 1) * share > count + 1e-9 for count, share in zip(counts, fractions, strict=True)]
        assert any(one_more)


def test_draws_by_seed_whatever_the_other_sources_are() -> None:
    first, second = draw([1000, 30], [0.9, 0.1], seed=3)
    assert second.tolist() == list(range(30))
    assert (len(first), len(set(first.tolist()))) == (270, 270)
    assert np.all(np.diff(first) > 0)
    assert first[:8].tolist() == [6, 7, 8, 10, 13, 16, 18, 23]
    swapped, larger = draw([30, 1000], [0.1, 0.9], seed=3)[1], draw([1000, 60], [0.9, 0.1], seed=3)[0]
    assert swapped.tolist() == first.tolist()
    assert set(first.tolist()) < set(larger.tolist())
    assert draw([1000, 30], [0.9, 0.1], seed=4)[0].tolist() != first.tolist()


def test_mixture_is_drawn_after_the_overlap_is_gone_and_told_by_source(tmp_path: Path) -> None:
    replay = tiny.sums(30, 500)
    mixture = sources(tmp_path, ("own.jsonl", 0.9, tiny.sums(200)), ("replay.jsonl", 0.1, replay))
    test = tiny.write_rows(tmp_path / "test.jsonl", replay[:20])
    loaded = load(tmp_path, mixture, eval_fraction=0.2, test=str(test))
    checked = check(loaded)
    own, other = (part["source"] for part in mixture)
    assert checked.findings["rows"] == {"train": 80, "eval": 20, "test": 20}
    held_out = Counter(example.where.rpartition(":")[0] for example in checked.eval)
    assert held_out == {own: 18, other: 2}
    described = checked.findings["sources"]
    keys = ("source", "fraction", "rows", "used")
    assert [[one[key] for key in keys] for one in described] == [[own, 0.9, 200, 90], [other, 0.1, 30, 10]]
    tokens = Counter[str]()
    for example in checked.train:
        tokens[example.where.rpartition(":")[0]] += len(example.input_ids)
    assert {one["source"]: one["tokens"] for one in described} == tokens
    line = f"mixture: 90 of 200 rows of {own} (0.9), 10 of 30 rows of {other} (0.1)"
    assert checked.findings["notes"][0] == line
    assert list(checked.findings["files"]) == ["train.0", "train.1", "test"]
    assert [checked.findings["files"][f"train.{n}"]["rows"] for n in (0, 1)] == [200, 30]
    again, other_seed = check(loaded), check(load(tmp_path, mixture, 1, eval_fraction=0.2, test=str(test)))
    places = [[example.where for example in one.train] for one in (checked, again, other_seed)]
    assert places[0] == places[1] != places[2]


def test_rows_in_two_sources_are_counted_and_stay_on_one_side(tmp_path: Path) -> None:
    rows = tiny.sums(40)
    mixture = sources(tmp_path, ("a.jsonl", 0.5, rows), ("b.jsonl", 0.5, rows[20:] + tiny.sums(20, 300)))
    checked = check(load(tmp_path, mixture, eval_fraction=0.2))
    texts = [{tuple(example.input_ids) for example in part} for part in (checked.train, checked.eval)]
    assert not texts[0] & texts[1]
    assert checked.findings["shared_rows"] == 20
    assert "20 rows of the mixture are also rows of an earlier source" in checked.findings["notes"]
    assert count_shared(np.array(["a", "b", "a", "b"]), np.array([b"x", b"x", b"x", b"y"])) == 1


def test_fraction_that_gives_no_row_is_refused_with_one_that_does(tmp_path: Path) -> None:
    parts = [("own.jsonl", 0.999, tiny.sums(30)), ("replay.jsonl", 0.001, tiny.sums(5, 99))]
    file = str(tmp_path / "replay.jsonl")
    words = rf"data\.train\.1\.fraction: 0\.001 of a mixture of 30 rows is no row of {file}, which has 5; try 0\.034 or"
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:\d+: {words} more") as caught:
        check(load(tmp_path, sources(tmp_path, *parts)))
    assert caught.value.exit_code == 2
    right = [(name, fraction, rows) for (name, _, rows), fraction in zip(parts, (0.966, 0.034), strict=True)]
    used = [one["used"] for one in check(load(tmp_path, sources(tmp_path, *right))).findings["sources"]]
    assert used == [30, 1]
    held = str(tiny.write_rows(tmp_path / "test.jsonl", parts[1][2]))
    with pytest.raises(RecipeError, match=r"data\.train\.1\.source: eval or test has every row of .*replay\.jsonl"):
        check(load(tmp_path, sources(tmp_path, *right), test=held))


def test_run_on_a_mixture_logs_and_reports_its_sources_and_keeps_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources(tmp_path, ("own.jsonl", 0.9, tiny.sums(18)), ("replay.jsonl", 0.1, tiny.sums(5, 99)))
    mixture = [{"source": "own.jsonl", "fraction": 0.9}, {"source": "replay.jsonl", "fraction": 0.1}]
    data = {"train": mixture, "eval_fraction": 0, "max_length": 64}
    file = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.save_base(tmp_path / "base"), Path("unused"), data=data)
    run = prepare(recipe.load(file), tmp_path / "run", 0)
    names = [part.source for part in run.recipe().data.sources("train")]
    assert names == [str(tmp_path / name) for name in ("own.jsonl", "replay.jsonl")]
    rows, _ = split_rows(run.recipe().data, 0)
    assert [row.source for row in rows] == [names[0]] * 18 + [names[1]] * 2
    assert plan_alone(recipe.load(file), 0).steps == plan_alone(run.recipe(), 0).steps == 5
    train(run)
    line = next(record["sources"] for record in read_log(run.log_file) if "sources" in record)
    assert line == f"mixture: 18 of 18 rows of {names[0]} (0.9), 2 of 5 rows of {names[1]} (0.1)"
    page = render(run)
    tokens = [one["tokens"] for one in read_json(run.data_file)["sources"]]
    assert "source of the mixture" in page
    assert all(f">{count:,}<" in page for count in tokens)
    assert json.dumps(mixture[0]["source"])[1:-1] in page


def test_plan_counts_the_rows_that_check_trains_on(tmp_path: Path) -> None:
    rows = tiny.sums(40)
    mixture = sources(tmp_path, ("own.jsonl", 0.5, rows), ("replay.jsonl", 0.5, tiny.sums(40, 100)))
    test, base = tiny.write_rows(tmp_path / "test.jsonl", rows[:8]), tiny.save_base(tmp_path / "base")
    for train_on in (mixture[0]["source"], mixture):
        data = {"train": train_on, "test": str(test), "max_length": 64}
        loaded = recipe.load(tiny.write_recipe(tmp_path / "recipe.yaml", base, Path("unused"), data=data))
        assert loaded.data.eval_fraction == 0.05
        planned, checked = outline(loaded, 0), examine(loaded, 0)
        assert planned.lengths.rows == checked.lengths.rows == (30 if train_on is not mixture else 60)
        assert planned.table.steps == checked.table.steps
