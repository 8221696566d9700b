"""The Python API: its names, the steps of the commands, and a finished run that is asked again under other settings."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmtune
from llmtune import api, recipe
from llmtune.api.steps import open_with
from llmtune.comparing import compare
from llmtune.errors import LlmtuneError, RecipeError, TrainingError
from llmtune.launch import process
from llmtune.launch.ending import Exit
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.tuning import step
from tests.support import runs, tiny

NAMES = ["Recipe", "combine", "compare", "evaluate", "export", "infer", "merge", "publish", "report", "train", "tune"]

ABOVE = {"compare": compare, "tune": step}
"""The modules of the functions that stand above the API."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A trained run, without evaluation, merge or report."""
    return runs.trained(tmp_path)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of each training that would start; it ends with an error of its own."""
    started: list[list[str]] = []

    def start(settings: Any, words: list[str]) -> Exit:
        started.append(words)
        return Exit(4, "no training")

    monkeypatch.setattr(process, "run_training", start)
    return started


def stored(run: Run, *sections: str) -> dict[str, Any]:
    """Sections of the recipe in a run's folder."""
    values = yaml.safe_load(run.recipe_file.read_text())
    return {section: values[section] for section in sections}


def test_exports_these_names_and_the_version() -> None:
    assert sorted(llmtune.__all__) == NAMES == sorted([*api.__all__, *ABOVE])
    assert sorted(dir(llmtune)) == sorted([*NAMES, "__version__"])
    for name in NAMES:
        assert getattr(llmtune, name) is getattr(ABOVE.get(name, api), name)
    assert llmtune.Recipe is Recipe
    with pytest.raises(AttributeError, match="module 'llmtune' has no attribute 'trian'"):
        llmtune.trian  # noqa: B018
    code = "import sys, llmtune; sys.exit('pydantic' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_imports_no_torch_until_a_step_runs() -> None:
    names = ", ".join(NAMES)
    code = f"import sys\nfrom llmtune import {names}\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_scores_on_other_rows_are_not_compared_with_those_of_checkpoints(
    tmp_path: Path, untrained: list[list[str]]
) -> None:
    run = runs.trained(tmp_path, train={"epochs": 1, "batch_size": 4, "keep_best": "score"})
    run.forget("train")
    (run.checkpoints / "step-000002").mkdir(parents=True)
    with pytest.raises(RecipeError, match="were scored on 64 rows, and scores on 32 cannot be compared; keep 64"):
        llmtune.train(run, set=["eval.rows=32"])
    assert not untrained
    assert stored(run, "eval")["eval"]["rows"] == 64
    with pytest.raises(LlmtuneError, match="no training"):
        llmtune.train(run, set=["eval.rows=32"], overwrite=True)


@pytest.mark.slow
def test_trains_and_takes_every_step_from_python(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", blocks=2)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(20))
    values = {
        "model": {"base": str(base)},
        "data": {"train": str(rows), "eval_fraction": 0.2},
        "method": {"kind": "lora", "rank": 4, "lr": 0.01},
        "train": {"epochs": 1, "batch_size": 4},
        "merge": {"dtype": "float32"},
    }
    run = llmtune.train(Recipe.model_validate(values), tmp_path / "run")
    assert run.done("train")
    before = run.manifest()["steps"]["train"]
    again = llmtune.train(Recipe.load(run.recipe_file, ["eval.limit=3"]), run.path)
    assert (again.recipe().eval.limit, again.manifest()["steps"]["train"]) == (3, before)
    assert llmtune.evaluate(run.path)["tuned"]["results"]["held_out"]["n"] == 3
    assert llmtune.merge(str(run.path))["dtype"] == "float32"
    assert llmtune.report(run) == run.report_file
    assert all(run.done(step) for step in ("train", "eval", "merge", "report"))


@pytest.mark.usefixtures("quick")
def test_step_under_other_settings_is_kept_and_done_again(run: Run) -> None:
    llmtune.merge(run)
    assert run.manifest()["steps"]["merge"]["dtype"] == "bfloat16"
    before = stored(run, "model", "data", "method", "train")
    facts = llmtune.merge(run, set=["merge.dtype=float32", "eval.limit=2"])
    assert facts["dtype"] == "float32"
    assert (stored(run, "merge")["merge"]["dtype"], stored(run, "eval")["eval"]["limit"]) == ("float32", 2)
    assert stored(run, "model", "data", "method", "train") == before
    assert run.done("train")
    assert run.done("merge")
    llmtune.report(run, set=["merge.dtype=bfloat16"])
    assert not run.done("merge")
    assert "dtype: bfloat16" in run.report_file.read_text()


def test_failed_step_keeps_the_settings_that_were(run: Run) -> None:
    before = run.recipe_file.read_text()
    with pytest.raises(LlmtuneError, match="publish"):
        llmtune.publish(run, set=["publish.repo=me/mine"])
    with pytest.raises(RecipeError, match=r"--set eval\.suite=quik: eval\.suite: 'quik' is not one of"):
        llmtune.evaluate(run, set=["eval.suite=quik"])
    assert run.recipe_file.read_text() == before


@pytest.mark.parametrize("override", ["method.lr=1", "data.train=x", "model.base=y", "train.seed=3", "method=lora"])
def test_refuses_settings_that_make_another_run(tmp_path: Path, override: str) -> None:
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.recipe_file.write_text("model: {base: a}\ndata: {train: b}\nmethod: full\n")
    section = override.partition("=")[0].partition(".")[0]
    for name in ("train", "evaluate", "merge", "publish", "report"):
        with pytest.raises(RecipeError) as caught:
            getattr(llmtune, name)(run.path, set=[override])
        assert str(caught.value) == (
            f"--set {override}: {section} is part of what the run in {run.path} is; "
            f"that is another run: llmtune run RECIPE --set {override} --out OTHER"
        )


def test_resolves_a_suite_file_from_the_working_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path.parent)
    Path("mine.yaml").write_text("tasks: [held_out]")
    assert open_with(run, ["eval.suite=mine.yaml"]).recipe().eval.suite == str(run.path.parent / "mine.yaml")


def test_trained_run_stays_unless_it_is_to_be_overwritten(run: Run, untrained: list[list[str]]) -> None:
    run.checkpoints.mkdir()
    delta = {file.name: file.read_bytes() for file in run.delta.iterdir()}
    assert llmtune.train(run) == run
    assert llmtune.train(str(run.path), set=["launch.processes=1"]).recipe().launch.processes == 1
    assert untrained == []
    assert run.checkpoints.is_dir()
    assert {file.name: file.read_bytes() for file in run.delta.iterdir()} == delta
    with pytest.raises(LlmtuneError, match="no training"):
        llmtune.train(run, overwrite=True, set=["launch.accelerate=cpu"])
    assert untrained == [[str(run.path)]]
    assert not run.checkpoints.exists()
    assert not run.done("train")
    assert stored(run, "launch")["launch"]["accelerate"] == "auto"


def test_tells_child_processes_the_recipe_its_overrides_and_the_folder(
    tmp_path: Path, untrained: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {base: a/b}\ndata: {train: rows.jsonl}\nmethod: lora\n")
    monkeypatch.chdir(tmp_path)
    for subject in (file, str(file)):
        with pytest.raises(LlmtuneError, match="no training"):
            llmtune.train(subject, set=["train.seed=1"])
    with pytest.raises(LlmtuneError, match="no training"):
        llmtune.train(Recipe.load(file, ["train.seed=1"]), "elsewhere", overwrite=True)
    assert untrained == [
        *[[str(file), "--set=train.seed=1", "--out=runs/mine"]] * 2,
        [str(file), "--set=train.seed=1", "--out=elsewhere", "--overwrite"],
    ]


def test_refuses_what_does_not_go_together(run: Run, tmp_path: Path) -> None:
    loaded = recipe.load(run.recipe_file)
    with pytest.raises(RecipeError, match="is for a recipe"):
        llmtune.train(run, tmp_path / "other")
    with pytest.raises(RecipeError, match=r"give overrides to Recipe\.load"):
        llmtune.train(loaded, tmp_path / "other", set=["train.seed=1"])
    with pytest.raises(RecipeError, match="a recipe without a file needs the run's folder"):
        llmtune.train(Recipe.model_validate({"model": {"base": "a"}, "data": {"train": "b"}, "method": "full"}))
    with pytest.raises(RecipeError, match="holds no run"):
        llmtune.report(tmp_path)
    run.forget("train")
    with pytest.raises(TrainingError, match="nothing is trained yet; first: llmtune train"):
        llmtune.merge(run)


def test_says_which_settings_stay_with_the_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    llmtune.report(run, set=["eval.limit=3"])
    assert "from now on the run has eval.limit=3; --set changes it again" in capsys.readouterr().out
    llmtune.report(run, set=["eval.limit=3"])
    assert "from now on" not in capsys.readouterr().out
