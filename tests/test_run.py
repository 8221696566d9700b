"""A run folder: one recipe, one process at a time, and steps that are done while their files are there."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune import recipe
from llmtune.errors import LlmtuneError, ProofError, PublishError, RecipeError
from llmtune.files import fingerprint, read_json, write_json, write_text
from llmtune.recipe.sections import Recipe
from llmtune.run import STEPS, Run, create, open_run

HOLD = """
import sys, time
from pathlib import Path
from llmtune.errors import LlmtuneError
from llmtune.run import Run
try:
    with Run(Path(sys.argv[1])).locked():
        print("locked", flush=True)
        time.sleep(float(sys.argv[2]))
except LlmtuneError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def settings(folder: Path, *overrides: str) -> Recipe:
    """A recipe from a file."""
    file = folder / "source.yaml"
    file.write_text("model: {base: a/b}\ndata: {train: rows.jsonl}\nmethod: {kind: full, adapter: {kind: lora}}\n")
    return recipe.load(file, list(overrides))


def new_run(folder: Path) -> Run:
    """A new run."""
    return create(settings(folder), folder / "run")


def hold(run: Run, seconds: float = 0) -> subprocess.Popen[str]:
    """Another process that locks the run for a while."""
    return subprocess.Popen([sys.executable, "-c", HOLD, run.path, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_new_run_has_the_recipe_with_every_default(tmp_path: Path) -> None:
    run = create(settings(tmp_path), tmp_path / "a" / "deep" / "run")
    assert run.recipe().model_dump() == settings(tmp_path).model_dump()
    assert "grad_clip: 1.0" in run.recipe_file.read_text()
    assert open_run(run.path) == run


def test_same_recipe_reopens_its_run_and_keeps_its_files(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_text(run.log_file, "{}\n")
    run.mark("train", [run.log_file])
    again = create(settings(tmp_path), run.path)
    assert again.done("train")
    assert create(run.recipe(), run.path).done("train")
    assert again.log_file.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("train.seed=1", "train.seed is 0 there and 1 here"),
        ("method.adapter.targets=[q_proj]", "method.adapter.targets is all-linear there and ['q_proj'] here"),
        ("method.adapter=none", "method.adapter.kind is lora there and none here"),
    ],
)
def test_refuses_another_recipe_with_the_difference(tmp_path: Path, override: str, difference: str) -> None:
    run = new_run(tmp_path)
    before = run.recipe_file.read_text()
    with pytest.raises(RecipeError) as caught:
        create(settings(tmp_path, override), run.path)
    assert f"{run.path}: holds another run ({difference})" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert run.recipe_file.read_text() == before


@pytest.mark.parametrize(
    "override", ["eval.limit=5", "merge.dtype=float32", "publish={repo: a/b}", "launch.processes=2"]
)
def test_same_run_takes_other_settings_and_does_their_step_again(tmp_path: Path, override: str) -> None:
    run = create(settings(tmp_path, "publish.repo=me/mine"), tmp_path / "run")
    for step in STEPS[:4]:
        write_text(run.path / step, "done")
        run.mark(step, [run.path / step])
    again = create(settings(tmp_path, "publish.repo=me/mine", override), run.path)
    assert again.recipe().model_dump() == settings(tmp_path, "publish.repo=me/mine", override).model_dump()
    changed = override.partition(".")[0].partition("=")[0]
    assert [step for step in STEPS[:4] if not again.done(step)] == [step for step in STEPS[:4] if step == changed]
    assert all(create(settings(tmp_path, "publish.repo=me/mine"), run.path).done(step) for step in STEPS[:4])


def test_step_of_an_older_version_is_done_under_any_settings(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.mark("eval", [run.recipe_file])
    manifest = run.manifest()
    del manifest["steps"]["eval"]["settings"]
    write_json(run.manifest_file, manifest)
    assert run.done("eval")


def test_refuses_to_overwrite_a_folder_of_the_users(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    write_text(mine / "thesis.txt", "years of work")
    with pytest.raises(RecipeError, match=r"is not empty and holds no run \(thesis.txt\)"):
        create(settings(tmp_path), mine)
    write_text(mine / "recipe.yaml", (tmp_path / "source.yaml").read_text())
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match="holds no run"):
            create(settings(tmp_path), mine, overwrite=overwrite)
    assert sorted(file.name for file in mine.iterdir()) == ["recipe.yaml", "thesis.txt"]


def test_refuses_a_file(tmp_path: Path) -> None:
    write_text(tmp_path / "out", "a file")
    with pytest.raises(RecipeError, match="is a file"):
        create(settings(tmp_path), tmp_path / "out")
    with pytest.raises(RecipeError, match="is a file"), Run(tmp_path / "out").locked():
        pass


def test_accepts_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert new_run(tmp_path).recipe_file.is_file()


def test_overwrite_empties_a_run_follows_no_link_and_keeps_the_lock(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_text(tmp_path / "elsewhere" / "model.safetensors", "weights")
    run.merged.symlink_to(tmp_path / "elsewhere")
    write_text(run.delta / "trained.safetensors", "old")
    run.mark("train", [run.delta])
    with run.locked():
        again = create(settings(tmp_path, "train.seed=1"), run.path, overwrite=True)
        other = hold(run)
        assert other.wait() == 2
    assert again.recipe().train.seed == 1
    assert not again.done("train")
    assert sorted(file.name for file in run.path.iterdir()) == [".lock", ".training.lock", "recipe.yaml"]
    assert (tmp_path / "elsewhere" / "model.safetensors").read_text() == "weights"


def test_refuses_to_open_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no run"):
        open_run(tmp_path)


def test_step_is_done_while_its_files_have_their_size(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    assert not run.done("train")
    write_text(run.delta / "deep" / "trained.safetensors", "weights")
    write_text(run.log_file, "{}\n")
    run.mark("train", [run.delta, run.log_file], steps=7)
    assert run.done("train")
    assert not run.done("eval")
    entry = run.manifest()["steps"]["train"]
    assert entry["steps"] == 7
    assert entry["files"] == {
        "delta/deep/trained.safetensors": fingerprint(run.delta / "deep" / "trained.safetensors"),
        "log.jsonl": fingerprint(run.log_file),
    }
    write_text(run.log_file, "{}\n{}\n")
    assert not run.done("train")
    write_text(run.log_file, "{}\n")
    assert run.done("train")
    (run.delta / "deep" / "trained.safetensors").unlink()
    assert not run.done("train")


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        [],
        {"steps": None},
        {"steps": {"train": None}},
        {"steps": {"train": {"finished": "now"}}},
        {"steps": {"train": {"files": {"delta/a": None}}}},
        {"steps": {"train": {"files": {"delta/a": {}}}}},
        {"steps": {"train": {"files": {"delta/a": {"bytes": 3}}}}},
        {"steps": {"train": {"files": {"delta/a": {"bytes": None, "sha256": "0"}}}}},
    ],
    ids=str,
)
def test_step_with_a_damaged_entry_is_not_done(tmp_path: Path, manifest: object) -> None:
    run = new_run(tmp_path)
    write_json(run.manifest_file, manifest)
    assert run.manifest()["steps"] == {}
    assert not run.done("train")
    run.mark("report", [run.recipe_file])
    assert run.done("report")


def test_refuses_to_mark_a_step_without_its_output(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(LlmtuneError, match=r"report.html: the step report should have left it"):
        run.mark("report", [run.report_file])
    assert not run.done("report")


def test_forget_includes_later_steps(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for step in STEPS:
        run.mark(step, [])
    run.forget("merge")
    assert [step for step in STEPS if run.done(step)] == ["train", "eval"]
    run.forget("train")
    assert not any(run.done(step) for step in STEPS)


def test_refuses_a_second_process_until_the_first_ends(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with run.locked():
        second = hold(run)
        message = second.communicate()[0]
        assert second.returncode == 2
        assert f"{run.path}: another llmtune process is at work in this folder" in message
    third = hold(run)
    assert third.communicate()[0] == "locked\n"
    assert third.returncode == 0


def test_training_that_outlives_its_command_keeps_others_out(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    code = HOLD.replace("locked():", "training():")
    words = [sys.executable, "-c", code, str(run.path), "60"]
    orphan = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert orphan.stdout is not None
    assert orphan.stdout.readline() == "locked\n"
    with pytest.raises(RecipeError, match="another llmtune process is at work in this folder"), run.locked():
        pass
    orphan.kill()
    orphan.wait()
    with run.locked(), run.training():
        pass


HALF = (".recipe.yaml.partial", ".data.json.partial", ".plan.json.partial-7", ".manifest.json.partial-7/manifest.json")


@pytest.mark.parametrize("half", HALF)
def test_half_files_of_killed_processes_are_no_content(tmp_path: Path, half: str) -> None:
    path = tmp_path / "run"
    (path / half).parent.mkdir(parents=True)
    (path / half).write_text("# half")
    run = create(settings(tmp_path), path)
    assert run.recipe().train.epochs == 2
    (path / ".merged.partial-9").mkdir()
    (path / ".mine.partial").touch()
    with run.locked():
        assert sorted(file.name for file in path.glob(".*partial*")) == [".mine.partial"]


def test_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    other = hold(run, 60)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(RecipeError, match="at work"), run.locked():
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with run.locked():
        pass


@pytest.mark.parametrize("text", [None, "{", "\x00"])
def test_names_a_damaged_file(tmp_path: Path, text: str | None) -> None:
    run = Run(tmp_path)
    if text is not None:
        write_text(run.manifest_file, text)
        with pytest.raises(LlmtuneError, match=r"manifest.json: cannot be read"):
            run.done("train")
    with pytest.raises(LlmtuneError, match=r"plan.json: cannot be read"):
        read_json(run.plan_file)


def test_verify_returns_the_fingerprints_of_a_step(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_text(run.delta / "deep" / "trained.safetensors", "weights")
    run.mark("train", [run.delta])
    assert run.verify("train") == run.manifest()["steps"]["train"]["files"]


@pytest.mark.parametrize("change", ["changed", "removed", "added"])
def test_verify_refuses_a_file_that_changed_after_its_step(tmp_path: Path, change: str) -> None:
    run = new_run(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        write_text(run.merged / name, "weights")
    run.mark("merge", [run.merged])
    file = run.merged / ("c.safetensors" if change == "added" else "b.safetensors")
    if change == "removed":
        file.unlink()
    else:
        file.write_text("weighty")  # as many bytes
    remedy = "remove it" if change == "added" else f"run it again: llmtune merge {run.path}"
    message = f"{file}: was {change} after `llmtune merge`; {remedy}"
    with pytest.raises(ProofError, match=re.escape(message)):
        run.verify("merge")
    with pytest.raises(PublishError, match=re.escape(message)):
        run.verify("merge", PublishError)


def test_verify_refuses_a_step_that_is_not_finished(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    write_text(run.delta / "trained.safetensors", "weights")
    with pytest.raises(ProofError, match=r"delta: is missing or not finished; first: llmtune train "):
        run.verify("train")
