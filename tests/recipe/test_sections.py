"""Recipes: the shipped ones load, overrides apply, and a dump has every key and loads as the same recipe."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from llmtune import recipe
from llmtune.errors import FieldError, RecipeError
from llmtune.plan.stages import Facts
from llmtune.recipe.sections import Recipe
from llmtune.run import locates_mistakes
from tests.support import ROOT
from tests.support.recipes import EVERYTHING, FACTS, GOOD, method, write
from tests.support.schema import violations

COUNT = 43
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_finds_every_shipped_recipe() -> None:
    assert len(SHIPPED) == COUNT


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT / "recipes")))
def test_loads_and_plans_every_shipped_recipe_within_the_schema(file: Path) -> None:
    loaded = recipe.load(file)
    loaded.plan(Facts(blocks=16, hidden=2048, parameters=10**9))
    assert violations(yaml.safe_load(file.read_text()), recipe.schema(), recipe.schema()) == []


def test_applies_overrides_in_order(tmp_path: Path) -> None:
    file = write(tmp_path, method("{kind: gradual, reaches: [1, 2, all]}"))
    loaded = recipe.load(
        file,
        [
            "method.reaches.0=0.25",
            "method.adapter={kind: lora, rank: 4}",
            "method.adapter.rank=8",
            "model.revision=abc",
            "model.revision=",
            "train.epochs=3",
            "publish.repo=me/mine",
            "data.train=a=b.jsonl",
        ],
    )
    method_section = loaded.method.model_dump()
    assert method_section["reaches"] == (0.25, 2, "all")
    assert method_section["adapter"]["rank"] == 8
    assert (loaded.model.revision, loaded.train.epochs) == (None, 3)
    assert loaded.publish is not None
    assert (loaded.publish.repo, loaded.data.train) == ("me/mine", "a=b.jsonl")


def test_later_error_names_the_file_or_override_that_wrote_the_key(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD + "train:\n  epochs: 1\n  seed: 1\n")
    loaded = recipe.load(file, ["train.seed=7", "train.schedule=linear"])
    assert str(loaded.located(FieldError("train.epochs", "no"))) == f"{file}:5: train.epochs: no"
    assert str(loaded.located(FieldError("train.seed", "no"))) == "--set train.seed=7: train.seed: no"
    assert str(loaded.located(FieldError("train.keep", "no"))) == f"{file}:4: train.keep: no"
    assert str(loaded.located(FieldError("eval.suite", "no"))) == f"{file}:1: eval.suite: no"


def test_reports_at_its_key_what_the_model_cannot_follow(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, method("\n  kind: gradual\n  reaches:\n  - 1\n  - 99")))
    with pytest.raises(RecipeError, match=r"recipe.yaml:7: method.reaches.1: reach 99 is beyond the model"):
        locates_mistakes(Recipe.plan)(loaded, FACTS)
    with pytest.raises(RecipeError, match=r"recipe.yaml:7: method.reaches.1: reach 99 is beyond the model"):
        locates_mistakes(Recipe.resolved)(loaded, FACTS, None)


def test_resolved_fills_in_revision_and_rates_and_keeps_its_file(tmp_path: Path) -> None:
    file = write(tmp_path, method("\n  kind: discriminative"))
    loaded = recipe.load(file)
    fixed = loaded.resolved(FACTS, "abc123")
    before, after = loaded.method.model_dump(), fixed.method.model_dump()
    assert (fixed.model.revision, after["lr"], after["bottom_ratio"]) == ("abc123", 9.5e-4, 0.1)
    assert fixed.plan(FACTS) == loaded.plan(FACTS)
    assert (loaded.model.revision, before["lr"]) == (None, None)
    assert str(fixed.located(FieldError("method.kind", "no"))) == f"{file}:4: method.kind: no"


@pytest.mark.parametrize("text", [GOOD, EVERYTHING, method("{kind: gradual, adapter: none}")])
@pytest.mark.parametrize("fix", [False, True], ids=["as-written", "resolved"])
def test_loads_the_same_recipe_from_a_dump(tmp_path: Path, text: str, fix: bool) -> None:
    loaded = recipe.load(write(tmp_path, text))
    loaded = loaded.resolved(FACTS, "no") if fix else loaded
    dumped = recipe.dump(loaded)
    again = recipe.load(write(tmp_path, dumped))
    assert again.model_dump() == loaded.model_dump()
    assert recipe.dump(again) == dumped


def test_dumps_every_default(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, GOOD))
    plain = yaml.safe_load(recipe.dump(loaded))
    assert set(plain) == set(Recipe.model_fields)
    for name in ("model", "data", "train", "launch", "eval", "merge"):
        assert set(plain[name]) == set(type(getattr(loaded, name)).model_fields)
    assert plain["method"]["adapter"] == {"kind": "none"}
    assert plain["publish"] is None


def test_forbids_changing_a_recipe(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, GOOD))
    for section, key in (
        (loaded, "train"),
        (loaded.train, "epochs"),
        (loaded.method, "lr"),
        (loaded.method.adapter, "kind"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


@pytest.mark.parametrize(
    "text", [GOOD, EVERYTHING, method("{kind: gradual, adapter: none, lr: [1.0e-3, 1.0e-4, 1.0e-5]}")]
)
def test_schema_accepts_what_loads(tmp_path: Path, text: str) -> None:
    loaded = recipe.load(write(tmp_path, text))
    root = recipe.schema()
    assert violations(yaml.safe_load(text), root, root) == []
    assert violations(yaml.safe_load(recipe.dump(loaded)), root, root) == []


def test_describes_every_key_of_the_schema() -> None:
    root = recipe.schema()
    for section in root["$defs"].values():
        for key, rule in section["properties"].items():
            assert rule.get("description"), (section["title"], key)
