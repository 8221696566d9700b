"""Reading rows: every kind of source, and errors that name file, line and key of the first bad row."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from llmtune.data.row import Row
from llmtune.data.rows import read
from llmtune.errors import MachineError, RecipeError
from tests.support import tiny

PAIRS = [
    {"id": "a", "prompt": "1+1?", "completion": "2"},
    {"id": "b", "prompt": 'say "hi",\nplease', "completion": "héllo"},
]
CHAT = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A CSV file with a header and a byte order mark."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A gzipped JSONL file."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A Parquet file."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {"t.jsonl": tiny.write_rows, "t.jsonl.gz": write_gzip, "t.csv": write_csv, "t.parquet": write_parquet}


@pytest.mark.parametrize("name", WRITERS)
def test_reads_the_same_rows_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows = read(str(WRITERS[name](tmp_path / name, PAIRS)))
    assert [(row.id, row.prompt[0]["content"], row.answer) for row in rows] == [
        (pair["id"], pair["prompt"], pair["completion"]) for pair in PAIRS
    ]
    assert [row.prompt[0]["role"] for row in rows] == ["user", "user"]


def test_gives_lines_of_the_file_as_places(tmp_path: Path) -> None:
    lines = read(str(tiny.write_rows(tmp_path / "t.jsonl", PAIRS)))
    assert [row.where for row in lines] == [f"{tmp_path}/t.jsonl:1", f"{tmp_path}/t.jsonl:2"]
    records = read(str(write_csv(tmp_path / "t.csv", [*reversed(PAIRS), PAIRS[0]])))
    assert [row.where[-2:] for row in records] == [":2", ":4", ":5"]  # the first record takes two lines


def test_reads_chat_messages_from_parquet_and_jsonl(tmp_path: Path) -> None:
    for name in ("t.jsonl", "t.parquet"):
        (row,) = read(str(WRITERS[name](tmp_path / name, [{"messages": CHAT}])))
        assert list(row.messages) == CHAT
        assert (row.prompt, row.answer, row.id) == (CHAT[:-1], "yes", row.where)


def test_skips_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(PAIRS[0]).encode() + b"\n\n  \n" + json.dumps(PAIRS[1]).encode() + b"\n"
    )
    assert [row.where[-2:] for row in read(str(path))] == [":1", ":4"]


def test_names_unused_columns(tmp_path: Path) -> None:
    rows = read(str(tiny.write_rows(tmp_path / "t.jsonl", [PAIRS[0] | {"lang": "en"}])))
    assert rows[0].ignored == ("lang",)
    turn = {"role": "user", "content": "hi", "weight": 1, "name": None}
    chat = [{"messages": [turn, {"role": "assistant", "content": "ho"}], "prompt": "x"}]
    assert read(str(tiny.write_rows(tmp_path / "u.jsonl", chat)))[0].ignored == ("messages.weight", "prompt")


def user(text: Any) -> dict[str, Any]:
    """A user turn."""
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    """An assistant turn."""
    return {"role": "assistant", "content": text}


BAD: dict[str, tuple[Any, str]] = {
    "null completion": ({"prompt": "a", "completion": None}, "completion: is null"),
    "number": ({"prompt": "a", "completion": 4}, "completion: is a number (4); text is expected"),
    "empty completion": ({"prompt": "a", "completion": " \n"}, "completion: is empty"),
    "empty prompt": ({"prompt": "", "completion": "b"}, "prompt: is empty"),
    "only a prompt": ({"prompt": "a", "id": "x"}, "columns prompt, id: completion is missing"),
    "not an object": (["a"], "holds a list; an object with messages, or prompt and completion"),
    "null messages": ({"messages": None}, "messages: is null; a list of turns"),
    "no messages": ({"messages": []}, "messages: is empty; a list of turns"),
    "turn is text": ({"messages": ["hi"]}, "messages[0]: is text; an object with role and content"),
    "unknown role": ({"messages": [{"role": "usr", "content": "a"}]}, "messages[0].role: is 'usr', not one of"),
    "role near": ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'?"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
    "sharegpt": ({"messages": [{"from": "human", "value": "a"}]}, "messages[0].role: is missing; rename from to role"),
    "empty assistant": ({"messages": [user("a"), assistant("")]}, "messages[1].content: is empty"),
    "null content": ({"messages": [user(None), assistant("b")]}, "messages[0].content: is null"),
    "parts": ({"messages": [user([{"type": "text"}]), assistant("b")]}, "messages[0].content: is a list; text"),
    "user last": ({"messages": [user("a")]}, "messages: the last turn is user; it must be assistant"),
    "assistant first": ({"messages": [assistant("a")]}, "messages: the first turn is assistant"),
    "tool call": (
        {"messages": [user("a"), assistant("b") | {"tool_calls": [{"name": "f"}]}]},
        "messages[1].tool_calls: is not supported; a turn has role and content only",
    ),
    "reasoning": ({"messages": [user("a"), assistant("b") | {"thinking": "hm"}]}, "messages[1].thinking: is not"),
    "tools": (
        {"messages": [user("a"), assistant("b")], "tools": [{}]},
        "tools: is not supported; a turn has role and content only",
    ),
    "alpaca": (
        {"id": "1", "instruction": "a", "output": "c"},
        "columns id, instruction, output: rename instruction to prompt and rename output to completion",
    ),
    "alpaca with input": ({"instruction": "a", "input": "b", "output": "c"}, "join instruction and input into prompt"),
    "one to rename": ({"prompt": "a", "output": "b"}, "columns prompt, output: rename output to completion"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "rename conversations to messages; in each turn from to role, value to content, and as roles human to user, "
        "gpt to assistant",
    ),
    "role of ShareGPT": (
        {"messages": [{"role": "human", "content": "a"}]},
        "messages[0].role: is 'human', not one of system, user, assistant; write user",
    ),
    "conversations": ({"conversations": []}, "columns conversations: rename conversations to messages"),
    "slip": ({"promt": "a", "completions": "b"}, "rename promt to prompt and rename completions to completion"),
    "capitals": ({"Prompt": "a", "Completion": "b"}, "rename Prompt to prompt and rename Completion to completion"),
    "strange": ({"x": 1, "y": 2}, "columns x, y: messages, or prompt and completion, are expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_names_file_line_and_key_of_the_first_bad_row(tmp_path: Path, name: str) -> None:
    bad, words = BAD[name]
    path = tiny.write_rows(tmp_path / "train.jsonl", [PAIRS[0], PAIRS[1], bad, bad])
    with pytest.raises(RecipeError) as caught:
        read(str(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_finds_a_bad_row_in_every_kind_of_file(tmp_path: Path) -> None:
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(RecipeError, match=rf"{name}:\d: completion: is (empty|null)"):
            read(str(WRITERS[name](tmp_path / name, [PAIRS[0], {"id": "c", "prompt": "x", "completion": None}])))


BROKEN = {
    "t.jsonl": [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"t.jsonl:2: not JSON: .* column \d+"),
        (b'[\n{"prompt": "a"}]', r"t.jsonl:1: not JSON.*one object per line"),
        (b"", "t.jsonl: is empty"),
        (b"\n\n", "t.jsonl: is empty"),
        (b'{"prompt": "caf\xe9"}\n', r"t.jsonl:1: not UTF-8 text \(byte 16"),
    ],
    "t.csv": [
        (b"", "t.csv: is empty"),
        (b"prompt,completion\n", "t.csv: is empty"),
        (b"prompt,completion\na,b\na,b,c\n", "t.csv:3: 3 cells where the header names 2 columns"),
        (b"question,answer\na,b\n", "t.csv:2: columns question, answer: rename question to prompt and rename answer"),
        (b'prompt,completion\na,"b\n', "t.csv:2: not CSV"),
        (b"prompt,completion\ncaf\xe9,b\n", "not UTF-8 text"),
    ],
    "t.parquet": [(b"PAR1 nothing", "t.parquet: not a Parquet file")],
    "t.jsonl.gz": [(b"not gzip", "t.jsonl.gz: cannot be read: Not a gzipped file")],
    "t.json": [(b"[]", r"t.json: one JSON list is not read; .*, as jq -c '\.\[\]' t\.json > t\.jsonl does")],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in BROKEN.items() for case in cases])
def test_reports_a_broken_file_in_one_line(tmp_path: Path, name: str, case: tuple[bytes, str]) -> None:
    content, words = case
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=words) as caught:
        read(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_names_the_searched_path_and_the_nearest_name_of_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "data/train.jsonl", PAIRS)
    with pytest.raises(RecipeError, match=rf"looked for {tmp_path}/data/trian.jsonl\); did you mean 'train.jsonl'\?"):
        read("data/trian.jsonl")
    with pytest.raises(RecipeError, match=rf"there is no folder {tmp_path}/dat"):
        read("dat/train.jsonl")
    with pytest.raises(RecipeError, match=r"data is a folder; name the file in it \(train.jsonl\)"):
        read("data")
    with pytest.raises(RecipeError, match="no file data/train "):
        read("data/train")
    assert len(read("data/train.jsonl")) == 2


def test_reports_an_unreachable_hub_data_set_as_machine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MachineError, match=r"nobody/nothing-2\.5: is not a file, .*HF_HUB_OFFLINE is set") as caught:
        read("nobody/nothing-2.5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "named"),
    [("me/set", ("me/set", "validation")), ("me/set-2.5:test", ("me/set-2.5", "test"))],
)
def test_reads_a_hub_data_set_by_split_without_code(
    monkeypatch: pytest.MonkeyPatch, source: str, named: tuple[str, str]
) -> None:
    def load(name: str, **options: Any) -> list[dict[str, Any]]:
        assert options == {"split": named[1]}  # in particular no trust_remote_code
        assert name == named[0]
        return PAIRS

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows: list[Row] = read(source, "validation")
    assert [row.where for row in rows] == [f"{source}:1", f"{source}:2"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found set.py"),
            "data sets that run code are not allowed: Dataset scripts",
        ),
        (ValueError("Unknown split \"trian\". Should be one of ['train'].\nmore"), "me/set: Unknown split"),
    ],
)
def test_refuses_a_hub_data_set_with_code_or_without_the_split(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(RecipeError, match=words) as caught:
        read("me/set")
    assert "\n" not in str(caught.value)
