"""Recipe files: whatever is not a small, plain YAML mapping is one line with its place."""

import json
from pathlib import Path

import pytest
import yaml

from llmtune import recipe
from llmtune.recipe.located_yaml import LIMIT_BYTES
from tests.support.recipes import GOOD, load_error, write

BROKEN = [
    ("", 1, "", "is empty; a mapping of sections (model, data, method, ...) is expected"),
    ("# nothing but a comment\n", 1, "", "is empty"),
    ("- a\n- b\n", 1, "", "holds a list"),
    ("just words\n", 1, "", "holds a single value"),
    ("model: [\n", 2, "", "not YAML"),
    (GOOD + "train:\n\tepochs: 1\n", 5, "", "not YAML"),
    ("a: b: c\n", 1, "", "not YAML: mapping values are not allowed here"),
    (GOOD + "---\n" + GOOD, 4, "", "not YAML: but found another document"),
    (GOOD + "train: {epochs: 1}\ndata: {train: b}\n", 5, "data", "duplicate key; it is also set at recipe.yaml:2"),
    (GOOD + "train: {seed: 1, seed: 2}", 4, "train.seed", "duplicate key"),
    ("x: &a 1\ny: *a\n", 2, "", "aliases (*a) are not allowed; write the value out"),
    ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", 2, "", "aliases"),
    (
        "x: !!python/object/apply:os.system [exit]\n",
        1,
        "x",
        "the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    ("x: !!python/name:os.system\n", 1, "x", "is not allowed; a recipe is plain data"),
    ("x: !mine {a: 1}\n", 1, "x", "the tag '!mine' is not allowed"),
    ("x: !!binary aGVsbG8=\n", 1, "x", "is not allowed"),
    (GOOD + "? [a]\n: 1\n", 4, "", "a key must be a single word"),
    ("x: " + "[" * 40 + "]" * 40, 1, "", "nested more than 32 levels deep"),
    ("[" * 100_000, 1, "", "nested more than 32 levels deep"),
    (b"model: \x00\n", 1, "", "not YAML: special characters are not allowed"),
    (GOOD + "train: {epochs: on}", 4, "train.epochs", 'on is true in YAML; write true or false, or "on" in quotes'),
    (GOOD + "train: {activation_checkpointing: yes}", 4, "train.activation_checkpointing", "yes is true in YAML"),
    (GOOD + "train: {activation_checkpointing: Off}", 4, "train.activation_checkpointing", "Off is false in YAML"),
    (GOOD.replace("some/model", "no"), 1, "model.base", 'no is false in YAML; write true or false, or "no" in quotes'),
    (GOOD + "train: {seed: 010}", 4, "train.seed", "010 is not a plain decimal number"),
    (GOOD + "train: {seed: 1:30}", 4, "train.seed", "1:30 is not a plain decimal number"),
    (GOOD + "train: {seed: !!int x}", 4, "train.seed", "x is not a plain decimal number"),
    (GOOD + "train: {epochs: !!float x}", 4, "train.epochs", "not a valid float: 'x'"),
    (GOOD + f"train: {{seed: {'9' * 5000}}}", 4, "train.seed", "not a valid int"),
    (GOOD.replace("{base: some/model}", "{base: a, revision: 2024-01-01}"), 1, "model.revision", "is a date in YAML"),
    (GOOD + "x: [" + "1," * 10_000 + "1]", 4, "", "more than 10,000 keys and values; no recipe has them"),
    (GOOD.replace("some/model", r'"\ud800"'), 1, "model.base", r"'\ud800', which no text may have"),
    (GOOD.replace("some/model", r'"a\0.gguf"'), 1, "model.base", r"'\x00', which no text may have"),
    ("!!python/object:os.x model: {base: a}", 1, "", "is not allowed; a recipe is plain data"),
    (GOOD + "train: !!map x", 4, "train", "the tag 'tag:yaml.org,2002:map' is not allowed"),
    (GOOD + "train: !!str {epochs: 1}", 4, "train", "the tag 'tag:yaml.org,2002:str' is not allowed"),
    (GOOD + "train: !!seq {epochs: 1}", 4, "train", "the tag 'tag:yaml.org,2002:seq' is not allowed"),
    ("!mine model: {base: a}", 1, "", "is not allowed; a recipe is plain data"),
    ("<<: {train: {seed: 1}}\n" + GOOD, 1, "<<", "unknown key"),
    (GOOD + f"train: {{seed: {'9' * 19}}}", 4, "train.seed", "is too large; a whole number has at most 18 digits"),
    (r'"\ud800": 1', 1, "", "which no text may have"),
]


@pytest.mark.parametrize(("text", "line", "key", "words"), BROKEN, ids=lambda value: str(value)[-40:])
def test_reports_a_mistake_in_one_line(tmp_path: Path, text: str | bytes, line: int, key: str, words: str) -> None:
    message = load_error(write(tmp_path, text))
    assert message.startswith(f"recipe.yaml:{line}: {key + ': ' if key else ''}"), message
    assert words in message


def test_refuses_files_that_are_not_text(tmp_path: Path) -> None:
    assert load_error(write(tmp_path, b"\x80\x81\xff")) == "recipe.yaml: cannot be read: it is not UTF-8 text"
    assert load_error(write(tmp_path, GOOD.encode("utf-16"))) == "recipe.yaml: cannot be read: it is not UTF-8 text"


def test_refuses_more_than_a_mebibyte_unread(tmp_path: Path) -> None:
    text = GOOD + "#" * (LIMIT_BYTES - len(GOOD))
    assert recipe.load(write(tmp_path, text)).model.base == "some/model"
    assert f"has {LIMIT_BYTES + 1} bytes; a recipe may have at most {LIMIT_BYTES}" in load_error(
        write(tmp_path, text + "#")
    )


def test_names_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert load_error(tmp_path / "recip.yaml") == "recip.yaml: no such file; did you mean 'recipe.yaml'?"
    assert load_error(tmp_path / "x" / "recipe.yaml") == "recipe.yaml: no such file"


def test_says_how_to_write_a_recipe_for_a_file_of_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    hint = "write a recipe for them: llmtune init rows.jsonl"
    assert load_error(rows) == f"rows.jsonl: holds rows, not a recipe; {hint}"


def test_refuses_a_folder_and_a_device(tmp_path: Path) -> None:
    assert load_error(tmp_path).endswith(": is a folder; give a file")
    write(tmp_path, GOOD)
    assert load_error(tmp_path).endswith(f": is a folder; give a file, such as {tmp_path.name}/recipe.yaml")
    assert load_error(Path("/dev/null")) == "null: is not a regular file"


def test_reads_json_and_a_byte_order_mark(tmp_path: Path) -> None:
    assert recipe.load(write(tmp_path, "\ufeff" + GOOD)).method.kind == "full"
    assert recipe.load(write(tmp_path, json.dumps(yaml.safe_load(GOOD), indent=2))).method.kind == "full"
