"""llmtune infer: the rows of a file with their answers, as evaluation gives them, and what is interrupted goes on."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.answering import batches
from llmtune.answering.request import Options
from llmtune.cli import main
from llmtune.errors import Interrupted, MachineError, RecipeError, TrainingError
from llmtune.evaluation.generate import greedy
from llmtune.evaluation.step import evaluate
from llmtune.files import write_json
from llmtune.run import Run
from tests.support import runs, tiny

TURN = {"role": "user", "content": "2 plus 2?"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run whose models answer differently."""
    folder = tmp_path_factory.mktemp("infer")
    base = tiny.save_base(folder / "base", initializer_range=0.3)
    return runs.with_held_out_rows(folder, base=base, step=0.3)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six prompts of different lengths."""
    return tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "7?" * n, "n": n} for n in (3, 1, 6, 2, 5, 4)])


@pytest.fixture
def two_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let batches have two rows."""
    monkeypatch.setattr(batches, "rows_per_batch", lambda *_: 2)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("is_extended", [False, True])
def test_answers_and_scores_are_those_of_the_evaluation(run: Run, tmp_path: Path, is_extended: bool) -> None:
    if is_extended:  # new tokens, and a model whose rows are generated for by transformers
        base = tiny.save_base(tmp_path / "base", "gpt2", initializer_range=0.3)
        model = {"base": str(base), "precision": "fp32", "add_tokens": ["<|go|>"]}
        run = runs.with_held_out_rows(tmp_path, base=base, model=model, step=0.5)
    stored = evaluate(run)
    out = tmp_path / "out.jsonl"
    summary = llmtune.infer(run, run.path.parent / "test.jsonl", out, model="both")
    written, source = read(out), read(run.path.parent / "test.jsonl")
    for name in ("base", "tuned"):
        rows = stored[name]["rows"]
        assert [row[name] for row in written] == [row["output"] for row in rows]
        assert [row["exact_match"][name] for row in written] == [row["exact_match"] for row in rows]
        value = stored[name]["results"]["held_out"]["metrics"]["exact_match"]["value"]
        assert summary["models"][name]["exact_match"] == {"value": value, "right": 0, "of": 5}
    assert any(row["base"] != row["tuned"] for row in written)
    assert [{key: row[key] for key in own} for row, own in zip(written, source, strict=True)] == source
    first = written[0]
    again = tiny.write_rows(tmp_path / "again.jsonl", [{"prompt": first["prompt"], "completion": first["tuned"]}])
    summary = llmtune.infer(run, again, tmp_path / "right.jsonl", max_new_tokens=summary["max_new_tokens"])
    assert summary["models"]["tuned"]["exact_match"] == {"value": 1.0, "right": 1, "of": 1}


def test_rows_keep_their_order_form_and_columns(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long, told = {"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "4"}
    asked = [{"id": "a", "messages": [TURN]}, {"id": "b", "messages": [long]}, {"id": "c", "messages": [TURN, told]}]
    file, out = tiny.write_rows(tmp_path / "rows.jsonl", asked), tmp_path / "new" / "out.jsonl"
    words = ["--temperature", "1.5", "--samples", "2", "--max-new-tokens", "4", "--json"]
    assert main(["infer", str(run.path), str(file), "-o", str(out), *words]) == 0
    summary = json.loads(capsys.readouterr().out)
    first, second, third = read(out)
    answers = first["tuned"]
    assert len(answers) == 2
    assert first == {"id": "a", "messages": [TURN, {"role": "assistant", "content": answers[0]}], "tuned": answers}
    assert second == {**asked[1], "error": "the prompt has 619 tokens, and the model's context 512"}
    assert third == {**asked[2], "tuned": third["tuned"], "exact_match": {"tuned": [False, False]}}
    assert summary["errors"] == [{"id": "b", "error": second["error"]}]
    assert summary["models"]["tuned"]["exact_match"]["of"] == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.summary.json"]
    assert main(["infer", str(run.path), str(file), "-o", str(tmp_path / "greedy.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith("tuned: 2 answers, exact match 0.0% (0 of 1)")
    assert lines[-2] == f"warning: 1 of 3 rows were not answered (b): {second['error']}"
    assert lines[-1] == f"answers  {tmp_path / 'greedy.jsonl'}"


@pytest.mark.usefixtures("two_a_batch")
def test_an_interrupted_file_goes_on(
    run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: Options = {"temperature": 1.5, "max_new_tokens": 4, "seed": 3}
    llmtune.infer(run, rows, tmp_path / "whole.jsonl", **drawn)
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.partial.jsonl"
    real, asked = greedy, list[int]()

    def stopped(model: Any, prompts: Any, *others: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(map(len, prompts))
        return real(model, prompts, *others)

    monkeypatch.setattr(batches, "greedy", stopped)
    for count in (2, 4):
        with pytest.raises(Interrupted, match=rf"{count} answers are in .*out\.partial\.jsonl"):
            llmtune.infer(run, rows, out, **drawn)
        assert not out.exists()
        assert asked == sorted(asked, reverse=True)
        asked.clear()
        with journal.open("a") as file:
            file.write('{"model": "tuned", "ro')  # as a killed process leaves it
    with pytest.raises(RecipeError, match=r"holds answers of other settings \(seed 3 there, 4 here\)"):
        llmtune.infer(run, rows, out, temperature=1.5, max_new_tokens=4, seed=4)
    with pytest.raises(RecipeError, match="other rows"):
        llmtune.infer(run, tiny.write_rows(tmp_path / "more.jsonl", [{"prompt": "a"}]), out, **drawn)
    llmtune.infer(run, rows, out, **drawn)
    assert len(asked) == 2
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()
    assert "4 answers are there, 2 are missing" in capsys.readouterr().out


@pytest.mark.usefixtures("two_a_batch")
def test_a_full_disk_keeps_what_was_answered(
    run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs, real = list[int](), os.fsync

    def full(descriptor: int) -> None:
        syncs.append(descriptor)
        if len(syncs) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MachineError, match=r"out\.partial\.jsonl: no space is left on the disk \("):
            llmtune.infer(run, rows, tmp_path / "out.jsonl", max_new_tokens=2)
    assert len(read(tmp_path / "out.partial.jsonl")) in (4, 5)
    assert llmtune.infer(run, rows, tmp_path / "out.jsonl", max_new_tokens=2)["models"]["tuned"]["answers"] == 6


def test_takes_no_file_that_is_not_its_own(run: Run, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(RecipeError, match=r"out\.jsonl: was not written by llmtune infer; give another -o"):
        llmtune.infer(run, rows, out)
    summary = llmtune.infer(run, rows, out, overwrite=True, max_new_tokens=2)
    before = out.stat().st_mtime_ns
    assert llmtune.infer(run, rows, out, max_new_tokens=2) == summary
    assert out.stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"max_new_tokens 2 there, 3 here\)"):
        llmtune.infer(run, rows, out, max_new_tokens=3)
    (tmp_path / "out.summary.json").write_text("{")
    with pytest.raises(RecipeError, match=r"out\.summary\.json: is damaged; .*--overwrite"):
        llmtune.infer(run, rows, out, max_new_tokens=2)
    write_json(tmp_path / "out.summary.json", summary)
    out.write_text("changed\n")
    with pytest.raises(RecipeError, match="was changed after it was written"):
        llmtune.infer(run, rows, out, max_new_tokens=2)
    journal = tmp_path / "other.partial.jsonl"
    journal.write_text("mine\n")
    with pytest.raises(RecipeError, match=r"other\.partial\.jsonl: was not written by llmtune infer"):
        llmtune.infer(run, rows, tmp_path / "other.jsonl", overwrite=True)
    assert journal.read_text() == "mine\n"
    long = tiny.write_rows(tmp_path / "long.jsonl", [{"prompt": "x" * 600}])
    with pytest.raises(RecipeError, match=r"no row can be asked: .*long\.jsonl:1: the prompt has 619 tokens"):
        llmtune.infer(run, long, tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("none*"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "which rows? Give a file: llmtune infer RUN rows.jsonl -o answers.jsonl"),
        (["rows.jsonl"], 2, "-o: is missing: where do the answers go? Such as -o rows.answers.jsonl"),
        (["row.jsonl", "-o", "a.jsonl"], 2, "no file row.jsonl (looked for "),
        (["rows.jsonl", "-o", "s3://b/a.jsonl"], 2, "s3://b/a.jsonl: is a URL; rows and answers are files"),
        (["s3://b/rows.jsonl", "-o", "a.jsonl"], 2, "s3://b/rows.jsonl: is a URL; rows and answers are files"),
        (["rows.jsonl", "-o", "rows.jsonl/a.jsonl"], 3, "rows.jsonl: cannot be written to: "),
    ],
)
def test_a_mistake_is_one_line(
    run: Run,
    rows: Path,
    words: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(rows.parent)
    assert main(["infer", str(run.path), *words]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llmtune: {message.replace('RUN', str(run.path))}")


def test_refuses_a_run_that_is_not_trained(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: {base: a}\ndata: {train: b}\nmethod: full\n")
    with pytest.raises(TrainingError, match="nothing is trained yet"):
        llmtune.infer(tmp_path / "run", rows, tmp_path / "out.jsonl")
