"""compare() from end to end on a tiny base: what it leaves, how it goes on, what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmtune.arms.stored import read_comparison
from llmtune.comparing.compare import compare
from llmtune.comparing.entrants.entrant import ArmRun
from llmtune.comparing.folder import Folder
from llmtune.comparing.winner import write_winner
from llmtune.errors import Interrupted, RecipeError
from llmtune.files import read_json
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from tests.support.comparisons import comparison


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_compares_arms_and_goes_on_after_an_interruption(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, arms, kept = tmp_path / "out", tmp_path / "arms.yaml", tmp_path / "kept.jsonl"
    monkeypatch.setenv("LLMTUNE_COMPARISONS", str(kept))
    arms.write_text("- lora\n- {name: hot, set: {method: {kind: full, lr: 1.0e+30}}}\n")
    asked: dict[str, Any] = {
        "minutes": 0.2,
        "seeds": 1,
        "sizes": [0.5],
        "baselines": ["zero-shot", "scratch", "tf-idf"],
    }
    train = ArmRun._train
    first: list[int] = []

    def stop_once(*values: Any) -> Any:
        if not first:
            first.append(1)
            raise Interrupted("stopped")
        return train(*values)

    monkeypatch.setattr(ArmRun, "_train", stop_once)
    with pytest.raises(Interrupted):
        compare(recipe, [str(arms)], out=out, **asked)
    assert Folder(out).record("lora@0.5")["status"] == "running"  # type: ignore[index]
    tried = Folder(out).record("lora@0.5")["search"]  # type: ignore[index]
    compare(out)

    comparison = read_comparison(out)
    by_name = {(arm["name"], arm["size"]): arm for arm in comparison["arms"]}
    assert {key: arm["status"] for key, arm in by_name.items()} == {("lora", 0.5): "done", ("hot", 0.5): "failed"}
    assert by_name["lora", 0.5]["search"][: len(tried)] == tried  # how many more there are, time decides
    assert re.search("is (nan|inf) at step", by_name["hot", 0.5]["reason"])
    seed = by_name["lora", 0.5]["seeds"][0]
    assert (len(seed["rows"]["score"]), seed["steps"]) == (5, 9)
    assert by_name["lora", 0.5]["limited"] == "3 times the recipe's epochs"
    assert seed["curve"][-1]["step"] == seed["steps"]
    run = Run(out / seed["run"])
    assert run.done("train")
    assert run.done("eval")
    scored = read_json(run.eval / "tuned.json")["results"]["held_out"]["metrics"]
    rows = seed["rows"]
    loss, score = (sum(value or 0.0 for value in rows[key]) for key in ("loss", "score"))
    assert loss / sum(rows["tokens"]) == pytest.approx(scored["loss"]["value"])
    assert score / len(rows["score"]) == scored["exact_match"]["value"]
    assert not run.checkpoints.exists()
    assert not list(out.glob("arms/*/.trial-*"))
    statuses = {one["name"]: one["status"] for one in comparison["baselines"]}
    assert statuses == {"zero-shot": "done", "scratch": "done", "tf-idf": "skipped"}
    base = read_json(out / "base.json")
    assert base["seconds"] > 0
    asked = run.manifest()["steps"]["eval"]["base_answers"]
    assert (asked["asked"], list(asked["reused"])) == ({}, ["held_out"]), "an arm asked the base again"
    assert base["results"]["held_out"] == read_json(run.eval / "base.json")["results"]["held_out"]
    assert comparison["baselines"][0]["rows"]["loss"] == base["results"]["held_out"]["scores"]["loss"]
    scratch = next(iter(out.glob("arms/scratch@0.5/seed-*/eval")))
    assert read_json(scratch / "base.json")["results"] == {}, "random weights were asked"
    assert read_json(scratch / "tuned.json")["results"]["held_out"]["n"] == 5
    winner = Recipe.load(out / "winner.yaml")
    assert comparison["verdict"]["winner"] == "lora"
    assert (winner.train.max_steps, winner.method.adapter.kind) == (9, "lora")
    assert winner.method.lr == by_name["lora", 0.5]["lr"]  # type: ignore[union-attr]
    assert winner.eval.suite == "none"
    assert "lora" in (out / "index.html").read_text()

    study = out / "arms" / "hot@0.5" / "study.db"
    study.write_text("no rate could be trained with")
    compare(recipe, ["lora"], out=out, seeds=1)  # nothing is left to do but what failed
    lora, hot = read_comparison(out)["arms"]
    assert lora == by_name["lora", 0.5]
    assert hot["minutes"] > by_name["hot", 0.5]["minutes"]
    assert not study.exists()
    assert [list(json.loads(line)["arms"]) for line in kept.read_text().splitlines()] == [["lora"]]
    arms.write_text("- {name: hot, set: {method: full}}\n")
    with pytest.raises(RecipeError, match=r"the arm hot sets method=.* there and method=full here"):
        compare(recipe, [str(arms)], out=out)
    with pytest.raises(RecipeError, match=r"was given 0\.2 minutes, and spent minutes do not come back"):
        compare(out, minutes=0.1)
    with pytest.raises(RecipeError, match=r"compares another recipe \(train.batch_size is 4 there and 2 here\)"):
        compare(recipe, out=out, set=["train.batch_size=2"])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        (["lora"], {"minutes": 0.0001}, r"is too little for an arm and the scratch baseline with 2 seeds; the"),
        (["lora"], {"set": ["data.eval_fraction=0"]}, r"data.eval_fraction: no validation row is there"),
        (["lora"], {"set": ["data.eval_fraction=0", "data.test=null"]}, r"no row is held out to compare on"),
        (["lora", "dora", "lora"], {}, "two arms have the name lora"),
        (["loar"], {}, "--arms: 'loar' is no arm; did you mean 'lora'"),
        (["lora"], {"baselines": ["tfidf"]}, "--baselines tfidf: is not one of these; did you mean 'tf-idf'"),
        (["lora"], {"sizes": [0.5, 2]}, "--sizes 2: is no share"),
        (["lora"], {"on": "gpu"}, "--on gpu: is not one of these; did you mean 'gpus'"),
        (["lora"], {"seeds": 0}, "--seeds 0: an arm is trained with 1 to 100 seeds"),
        (["lora"], {"set": ["launch.accelerate=fsdp2"]}, "launch.accelerate: fsdp2 shards a base .*, and each arm"),
        (["lora"], {"out": "s3://bucket/mine"}, "--out s3://bucket/mine: arms train and are kept on this machine"),
        (["same.yaml"], {}, "--arms: lora and mine are the same recipe"),
        (
            ["rows.yaml"],
            {},
            r"rows.yaml:1: 0.set: data.test is the same for all arms; an arm sets other keys, of method",
        ),
        (["seed.yaml"], {}, r"seed.yaml:1: 0.set: train.seed is the same for all arms"),
        (["lisa.yaml"], {"strict": True}, "--strict: the arm many cannot be: .*100 is more than the model's 2 blocks"),
    ],
)
def test_refuses_in_one_line_before_anything_trains(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, arms: list[str], options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same.yaml").write_text("- lora\n- {name: mine, set: {method: {kind: lora}}}\n")
    (tmp_path / "rows.yaml").write_text("- {name: easy, set: {method: full, data: {test: easy.jsonl}}}\n")
    (tmp_path / "seed.yaml").write_text("- {name: lucky, set: {train.seed: 7}}\n")
    (tmp_path / "lisa.yaml").write_text("- {name: many, set: {method: {kind: lisa, blocks: 100}}}\n")
    asked: Any = {"out": "out", **options}
    with pytest.raises(RecipeError, match=message):
        compare(recipe, arms, **asked)
    assert not Path("out/arms").exists()
    assert not Path("s3:").exists()


def test_refuses_a_folder_of_something_else(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"is not empty and holds no comparison"):
        compare(recipe, ["lora"], out=tmp_path)
    with pytest.raises(RecipeError, match="holds no comparison; give a recipe's file"):
        compare(tmp_path)


def test_a_comparison_without_a_winner_removes_the_recipe_of_an_earlier_one(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for text in ("earlier", None):
        if text:
            folder.winner.write_text(text)
        assert not write_winner(folder, comparison([]))
        assert not folder.winner.exists()
