"""A base is asked once: its kept answers are those that it gives, and whatever decides them has it asked again."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmtune.arms.saved import seconds_saved
from llmtune.evaluation import step
from llmtune.evaluation.exam import Exam
from llmtune.evaluation.forgetting import general
from llmtune.evaluation.results import GENERAL_PART
from llmtune.evaluation.reuse import answers, store
from llmtune.evaluation.reuse.facts import part_facts
from llmtune.evaluation.step import ask_base, evaluate
from llmtune.files import cache_folder, read_json
from llmtune.inference import room
from llmtune.run import Run
from tests.support import runs
from tests.support.suites import mine

PARTS = ["held_out", "held_out_few_shot", "mine", GENERAL_PART]


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of an evaluation on held-out rows, a task of its own and a few general questions and texts."""
    read = general._read
    monkeypatch.setattr(general, "_read", lambda file: read(file)[:2])
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "suite.yaml").write_text("tasks: [held_out, task.yaml]")
    mine(folder)
    return {"suite": str(folder / "suite.yaml"), "shots": 1, "forgetting": True}


def _took(run: Run) -> tuple[list[str], list[str]]:
    """The parts that were asked in a run's last evaluation, and those that were not asked again."""
    seconds = run.manifest()["steps"]["eval"]["base_answers"]
    assert all(value > 0 for part in seconds.values() for value in part.values())
    return list(seconds["asked"]), list(seconds["reused"])


def _stored(run: Run) -> list[bytes]:
    return [(run.eval / f"{name}.json").read_bytes() for name in ("base", "tuned", "settings")]


def _other(folder: Path, run: Run) -> Run:
    """A run of another method on the same base and rows."""
    recipe = run.recipe()
    data = recipe.data.model_dump(include={"train", "test", "eval_fraction"})
    method = {"kind": "full", "lr": 0.01}
    return runs.trained(folder, method, base=Path(recipe.model.base), data=data, eval=recipe.eval.model_dump())


def test_kept_answers_are_those_that_a_base_gives(
    tmp_path: Path, suite: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is read is bit for bit what is asked, for another method too; other weights are asked again."""
    run = runs.with_held_out_rows(tmp_path, eval=suite)
    first = evaluate(run)
    assert _took(run) == (PARTS, [])
    asked = _stored(run)
    capsys.readouterr()
    assert evaluate(run) == first
    assert _took(run) == ([], PARTS)
    assert _stored(run) == asked
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("base, ")]
    assert len(lines) == 4
    assert all(line.endswith("same weights, questions and settings") for line in lines)
    shutil.rmtree(cache_folder() / "answers")
    assert evaluate(run) == first
    assert _took(run) == (PARTS, [])
    other = _other(tmp_path / "other", run)
    seconds = sum(run.manifest()["steps"]["eval"]["base_answers"]["asked"].values())
    assert ask_base(other)["results"] == first["base"]["results"]
    assert not other.eval.exists()
    assert seconds_saved(other) == {}
    evaluate(other)
    assert _took(other) == ([], PARTS)
    assert seconds_saved(other) == {"base answers": pytest.approx(seconds)}
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    changed = ask_base(_other(tmp_path / "changed", run))
    assert changed["results"]["held_out"]["scores"]["loss"] != first["base"]["results"]["held_out"]["scores"]["loss"]


def test_results_tell_in_which_batches_base_and_tuned_model_were_asked(
    tmp_path: Path, suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base's kept answers with those that they were given in, whatever is free when the tuned model is asked."""
    run = runs.with_held_out_rows(tmp_path, eval=suite)
    told: dict[int, Any] = {}
    for free in (2**18, 2**40):
        monkeypatch.setattr(room, "free_bytes", lambda device, free=free: free)
        capsys.readouterr()
        evaluate(run)
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        results = [read_json(run.eval / f"{name}.json")["results"] for name in ("base", "tuned")]
        told[free] = notes, *({task: one["batch_rows"] for task, one in of_model.items()} for of_model in results)
    notes, base, tuned = told[2**18]
    few_shot = base.pop("held_out_few_shot")
    assert notes == []
    assert base == tuned
    assert base["held_out"].keys() == few_shot.keys() == {"answers", "losses"}
    assert base["mine"].keys() == {"answers"}
    notes, again, more = told[2**40]
    assert again == {**base, "held_out_few_shot": few_shot}, "kept with the answers"
    before, after = base["held_out"]["answers"], more["held_out"]["answers"]
    assert before < after
    words = f"at most {before} rows a batch for the base's answers, and {after} for the tuned model's; in 16 bits"
    assert any(note.startswith(f"note: held_out: {words}") for note in notes)


def _exam(run: Run, monkeypatch: pytest.MonkeyPatch) -> Exam:
    """The exam of a run, of which nothing is asked."""
    exams: list[Exam] = []

    def ask(exam: Exam, *_: object) -> dict[str, Any]:
        exams.append(exam)
        return {}

    monkeypatch.setattr(step, "ask", ask)
    ask_base(run)
    return exams[0]


def test_another_question_or_setting_is_asked(
    tmp_path: Path, suite: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change of what is asked, or of how it is scored, changes what decides the answers."""
    exam = _exam(runs.with_held_out_rows(tmp_path, eval=suite), monkeypatch)
    asked = exam.held_out["held_out"]
    row, example, truth = asked.rows[0], asked.examples[0], asked.truths[0]

    def of_rows(**changes: Any) -> Exam:
        return replace(exam, held_out={**exam.held_out, "held_out": replace(asked, **changes)})

    exams = [
        exam,
        replace(exam, metrics=("exact_match", "chrf")),
        replace(exam, labels=("1", "2")),
        replace(exam, stop={3}),
        replace(exam, new_tokens=exam.new_tokens + 1),
        replace(exam, limit=3),
        replace(exam, rules=replace(exam.rules, reasoning="drop")),
        of_rows(rows=[replace(row, id="another"), *asked.rows[1:]]),
        of_rows(prompt_ids=[[5, *asked.prompt_ids[0]], *asked.prompt_ids[1:]]),
        of_rows(examples=[replace(example, input_ids=[5, *example.input_ids]), *asked.examples[1:]]),
        of_rows(truths=[replace(truth, final="another"), *asked.truths[1:]]),
        of_rows(special=not asked.special),
        of_rows(of=asked.of + 1),
    ]
    assert len({str(part_facts(one, "held_out")) for one in exams}) == len(exams)
    assert exam.general is not None
    others = replace(exam, general=replace(exam.general, texts=exam.general.texts[1:]))
    assert part_facts(others, GENERAL_PART) != part_facts(exam, GENERAL_PART)
    (task,) = exam.tasks
    before = part_facts(exam, "mine")
    task.dataset["test"] = task.dataset["test"].select([0, 1, 3])
    assert part_facts(exam, "mine") != before
    task.set_config("doc_to_choice", ["nay", "yea"])
    assert (
        len({str(one) for one in (before, part_facts(exam, "mine"), part_facts(replace(exam, limit=1), "mine"))}) == 3
    )


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def _changed(file: Path) -> None:
    file.write_text(file.read_text().replace("0.25", "0.75"))


def _foreign(file: Path) -> None:
    file.write_text("[1]")


@pytest.mark.parametrize("damage", [_cut, _changed, _foreign, Path.unlink])
def test_damaged_answers_are_not_read(damage: Callable[[Path], None]) -> None:
    store.keep({"a": 1}, {"score": 0.25}, 2.5)
    kept = store.recall({"a": 1})
    assert kept is not None
    assert (kept.answers, kept.seconds) == ({"score": 0.25}, 2.5)
    assert store.recall({"a": 2}) is None
    (file,) = (cache_folder() / "answers").iterdir()
    damage(file)
    assert store.recall({"a": 1}) is None


def test_answers_that_were_not_read_for_longest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder keeps within its limit, and its user alone may read it; without a folder nothing is kept."""
    for number in range(3):
        store.keep({"n": number}, "a" * 1000, 1)
        assert store.recall({"n": 0}) is not None
    monkeypatch.setattr(store, "LIMIT", 3000)
    store.keep({"n": 3}, "a" * 1000, 1)
    assert [store.recall({"n": number}) is not None for number in range(4)] == [True, False, False, True]
    assert (cache_folder() / "answers").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("LLMTUNE_CACHE", "/proc/none")
    store.keep({"n": 0}, "a", 1)
    assert store.recall({"n": 0}) is None


def test_processes_read_what_the_first_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process neither reads nor writes: it takes what it is told."""
    told = store.Kept([{}, []], 1.5, "2026-01-01 10:00")
    monkeypatch.setattr(answers, "rank", lambda: 1)
    monkeypatch.setattr(answers, "gather", lambda value: [told, value])
    monkeypatch.setattr(answers, "part_facts", lambda exam, part: {})
    base = answers.BaseAnswers(None, {})  # type: ignore[arg-type]  # what it is asked does not matter here
    assert base.recall("held_out") == (({}, []), told.given)
    base.keep("mine", ({}, []), 2.5)
    assert base.seconds() == {"asked": {"mine": 2.5}, "reused": {"held_out": 1.5}}
    assert not (cache_folder() / "answers").exists()
