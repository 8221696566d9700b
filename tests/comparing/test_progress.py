"""What a comparison tells while its entrants work: which phase each is in, and what one came to."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llmtune import working
from llmtune.arms.arm import ARMS
from llmtune.comparing import progress
from llmtune.comparing.folder import Folder
from llmtune.comparing.outcome import without_examples
from llmtune.comparing.phase import Phase, phase_of, phases_words
from llmtune.comparing.progress import following, result_line
from llmtune.comparing.request import Entrant, Request
from llmtune.evaluation.results import TEXTS_COMPARED
from llmtune.files import write_json
from llmtune.recipe.sections import Recipe
from llmtune.recipe.standing import written
from tests.support.comparisons import arm

LORA = Entrant(ARMS["lora"], 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A comparison that has begun, with seed 3 as its first."""
    head = {"recipe": {"train": {"seed": 3}}}
    write_json(tmp_path / "request.json", {"request": Request((ARMS["lora"],)).to_json(), "head": head})
    return Folder(tmp_path)


def log(run: Path, step: int) -> None:
    """Add a step to a run's log, and half of a line that is being written."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0}) + "\n" + '{"step": 9')


def record(folder: Folder, **facts: Any) -> None:
    """Keep what the worker of lora came to."""
    known: Any = {"name": "lora", "set": [], "size": 1.0, "status": "running", **facts}
    folder.write_record("lora", known)


def test_phase_follows_an_arm_from_its_start_to_its_end(folder: Folder) -> None:
    home = folder.arm("lora")
    seen: list[str] = []

    def see() -> None:
        seen.append(str(phase_of(folder, LORA)))

    see()
    record(folder)
    see()
    trial = home / ".trial-x"
    log(trial / "run", 2)
    see()
    (home / "study.db").write_text("")
    record(folder, search=[{}])
    see()
    (trial / "run" / "log.jsonl").unlink()
    (trial / "run").rmdir()
    trial.rmdir()
    record(folder, search=[{}], lr=1e-3, steps=40, seeds=[{}])
    see()
    log(home / "seed-4", 12)
    see()
    write_json(home / "seed-4" / "manifest.json", {"steps": {"train": {"finished": "now", "files": {}}}})
    see()
    record(folder, status="done")
    see()
    assert seen == [
        "starting",
        "starting",
        "measuring its pace",
        "searching the rate, trial 2 of at most 4, step 2",
        "training, seed 4",
        "training, seed 4, step 12 of 40",
        "evaluating, seed 4",
        "done",
    ]


def test_several_arms_are_counted_by_what_they_do() -> None:
    phases = [Phase("training", "seed 0, step 1 of 9"), Phase("evaluating", "seed 0"), Phase("training", "seed 1")]
    assert phases_words(phases) == "2 training, 1 evaluating"
    assert phases_words(phases[:1]) == "training, seed 0, step 1 of 9"


def test_line_of_progress_says_what_goes_on(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "POLL", 0.01)
    monkeypatch.setattr(working, "DELAY", 0.05)
    record(folder, lr=1e-3, steps=40)
    log(folder.arm("lora") / "seed-3", 12)
    with following(folder, [LORA], "1 of 6:", 300):
        time.sleep(0.2)
    out = "".join(capsys.readouterr())
    assert out.startswith("1 of 6: lora, training, seed 3, step 12 of 40: 0 of 300 s")


def test_arms_publish_nothing_and_tell_no_tracker(tmp_path: Path, recipe: Path) -> None:
    published = Recipe.load(recipe, ["publish={repo: me/model}", "track=[tensorboard]"])
    folder = Folder(tmp_path / "out")
    head: Any = {"recipe": {"train": {"seed": 0}}}
    folder.write_request(published, Request((ARMS["lora"],)), head)
    (entrant,) = folder.entrants()
    arm_recipe = folder.recipe_of(entrant)
    assert (arm_recipe.publish, arm_recipe.track) == (None, ())
    kept = written(Recipe.load(folder.recipe_file))  # of which the winner's recipe is made
    assert (kept["publish"], kept["track"]) == ({"repo": "me/model"}, ["tensorboard"])


def test_says_why_no_worked_example_was_asked() -> None:
    texts: Any = {"held_out": {"compared": TEXTS_COMPARED}}
    assert without_examples(texts) == "held-out rows are plain texts"
    assert without_examples({"held_out": {"compared": "text"}}) == "no worked example fits beside a question"  # type: ignore[typeddict-item]


def test_tells_the_loss_of_plain_texts_per_token() -> None:
    """The rows of this arm have two tokens each: 2.0 nats on the four of five that it answers, 4.0 on the others."""
    assert result_line(arm("b", 0.8), "b", "loss").startswith("b: loss 1.2 over 1 seed, rate 1e-3")
    assert result_line(arm("b", [0.8, 0.6]), "b", "exact_match").startswith("b: exact_match 0.7 over 2 seeds")
