"""Reading rows: every kind of source, and errors that name file, line and key of the first bad row."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from llmtune.data.row import Row
from llmtune.data.rows import Form, read
from llmtune.errors import FieldError, MachineError, RecipeError
from llmtune.recipe.data import Data
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


def calls(*calls: Any) -> dict[str, Any]:
    """An assistant turn of calls alone."""
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


BAD_PAIRS: dict[str, tuple[Any, str]] = {
    "null completion": ({"prompt": "a", "completion": None}, "completion: is null"),
    "number": ({"prompt": "a", "completion": 4}, "completion: is a number (4); text is expected"),
    "empty completion": ({"prompt": "a", "completion": " \n"}, "completion: is empty"),
    "empty prompt": ({"prompt": "", "completion": "b"}, "prompt: is empty"),
    "only a prompt": ({"prompt": "a", "id": "x"}, "columns prompt, id: completion is missing"),
    "only a thought": ({"prompt": "a", "completion": "<think>b</think>"}, "completion: is empty"),
    "two answers": ({"prompt": "a", "completion": [user("b")]}, "completion: the last turn is user"),
    "answer as a prompt": ({"prompt": [assistant("b")], "completion": "b"}, "prompt: the first turn is assistant; a"),
    "not an object": (["a"], "holds a list; an object with messages, or prompt and completion"),
    "other names": ({"question": "a", "answer": "b"}, "write data.map: {prompt: question, completion: answer}"),
    "one other name": ({"prompt": "a", "output": "b"}, "columns prompt, output: write data.map: {completion: output}"),
    "two questions": (
        {"query": "a", "context": "b", "response": "c"},
        'columns query, context, response: write data.map: {prompt: "{query}\\n{context}", completion: response}',
    ),
    "labels": ({"text": "a", "label": "b"}, "{prompt: text, completion: label}, or data.format: text to learn text al"),
    "slip": ({"promt": "a", "completions": "b"}, "write data.map: {prompt: promt, completion: completions}"),
    "slip of messages": ({"mesages": []}, "columns mesages: write data.map: {messages: mesages}"),
    "capitals": ({"Prompt": "a", "Completion": "b"}, "write data.map: {prompt: Prompt, completion: Completion}"),
    "strange": ({"x": 1, "y": 2}, "columns x, y: messages, or conversations, or chosen and rejected, or prompt and"),
    "two formats": ({"instruction": "a", "output": "b"}, ":3: is alpaca, but "),
}
BAD_CHATS: dict[str, tuple[Any, str]] = {
    "null": (None, "messages: is null; a list of turns"),
    "empty": ([], "messages: is empty; a list of turns"),
    "text": (["hi"], "messages[0]: is text; an object with role and content"),
    "unknown role": (
        [{"role": "narrator", "content": "a"}],
        "messages[0].role: is 'narrator', not one of system, user",
    ),
    "role near": ([{"role": "asistant", "content": "a"}], "did you mean 'assistant'?"),
    "no content": ([{"role": "user"}], "messages[0].content: is missing"),
    "half sharegpt": ([user("a"), {"from": "gpt", "value": "b"}], "messages[1].role: is missing; rename from to role"),
    "empty assistant": ([user("a"), assistant("")], "messages[1].content: is empty"),
    "null content": ([user(None), assistant("b")], "messages[0].content: is null"),
    "image": (
        [user([{"type": "image_url"}]), assistant("b")],
        "messages[0].content[0]: is of type 'image_url'; llmtune",
    ),
    "part": ([user([7]), assistant("b")], "messages[0].content[0]: is a number (7); a text part is expected"),
    "user last": ([user("a")], "messages: the last turn is user; it must be assistant"),
    "tool last": ([user("a"), {"role": "tool", "content": "1"}], "messages: the last turn is tool; it must be assista"),
    "assistant first": ([assistant("a")], "messages: the first turn is assistant"),
    "no arguments": (
        [user("a"), calls({"function": {"name": "f"}})],
        "messages[1].tool_calls[0].function.arguments: is missing; a call,",
    ),
    "no name": ([user("a"), calls({"arguments": {}})], "messages[1].tool_calls[0].name: is missing; a call,"),
    "arguments no JSON": (
        [user("a"), calls({"name": "f", "arguments": "{x"})],
        "messages[1].tool_calls[0].arguments: is text that is no JSON (Expecting",
    ),
    "list of arguments": (
        [user("a"), calls({"name": "f", "arguments": [1]})],
        "tool_calls[0].arguments: is a list; an",
    ),
    "calls no list": ([user("a"), assistant("") | {"tool_calls": True}], "messages[1].tool_calls: is true or false"),
    "reasoning no text": ([user("a"), assistant("b") | {"thinking": [1]}], "messages[1].thinking: is a list; text is"),
}
BAD_TOOLS: dict[str, tuple[Any, str]] = {
    "text": ("weather", "tools: is text that is no JSON (Expecting"),
    "JSON, but no list": ('{"name": "f"}', "tools: is an object; a list of tools is expected"),
    "no name": ([{}], "tools[0].name: is missing; a tool"),
    "number": ([3], "tools[0]: is a number (3); a tool"),
    "half a character": ([{"name": "f", "description": "\ud800"}], "tools[0]: holds half of a character"),
}
BAD: dict[str, tuple[list[dict[str, Any]], Any, str]] = {
    **{name: (PAIRS, bad, words) for name, (bad, words) in BAD_PAIRS.items()},
    **{
        f"messages: {name}": ([{"messages": CHAT}] * 2, {"messages": turns}, words)
        for name, (turns, words) in BAD_CHATS.items()
    },
    **{
        f"tools: {name}": ([{"messages": CHAT}] * 2, {"messages": CHAT, "tools": tools}, words)
        for name, (tools, words) in BAD_TOOLS.items()
    },
}


@pytest.mark.parametrize("name", BAD)
def test_names_file_line_and_key_of_the_first_bad_row(tmp_path: Path, name: str) -> None:
    good, bad, words = BAD[name]
    path = tiny.write_rows(tmp_path / "train.jsonl", [*good, bad, bad])
    with pytest.raises(RecipeError) as caught:
        read(str(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


CALL = {"name": "sum", "arguments": {"a": 1, "b": "ü"}}
SUM: dict[str, Any] = {
    "name": "sum",
    "description": "adds",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
TOOLS = ({"type": "function", "function": SUM},)
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
PAIR = [user("1+1?"), assistant("2")]
SYSTEM = {"role": "system", "content": "Be brief."}
USED = [user("1+1?"), CALLED, {"role": "tool", "content": '{"sum": "ü"}'}, assistant("2")]
GPT = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]

FORMATS: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    "chat": ({"messages": CHAT}, "chat (messages)", CHAT),
    "another column": ({"dialogue": PAIR, "turns": 2}, "chat (dialogue)", PAIR),
    "roles": (
        {"messages": [{"role": role, "content": "a"} for role in ("developer", "human", "observation", "model")]},
        "chat (messages)",
        [{"role": role, "content": "a"} for role in ("system", "user", "tool", "assistant")],
    ),
    "parts": (
        {"conversations": [user([{"type": "text", "text": "1+"}, {"text": "1?"}]), assistant(["2"])]},
        "chat (conversations)",
        PAIR,
    ),
    "tools": (
        {
            "messages": [
                user("1+1?"),
                {"role": "assistant", "content": None, "tool_calls": [{"id": 7, "function": CALL}]},
                {"role": "tool", "tool_call_id": 7, "name": "sum", "content": [{"type": "text", "text": "2"}]},
                assistant("2"),
            ],
            "tools": TOOLS,
        },
        "chat (messages, tools)",
        [
            user("1+1?"),
            CALLED | {"tool_calls": [{"type": "function", "id": "7", "function": CALL}]},
            {"role": "tool", "content": "2", "name": "sum", "tool_call_id": "7"},
            assistant("2"),
        ],
    ),
    "tools as JSON text": (
        {
            "messages": [
                user("1+1?"),
                {"role": "assistant", "function_call": CALL | {"arguments": json.dumps(CALL["arguments"])}},
                {"role": "function", "content": {"sum": "ü"}},
                assistant("2"),
            ],
            "tools": json.dumps([SUM]),
        },
        "chat (messages, tools)",
        USED,
    ),
    "call at the end": ({"messages": [user("1+1?"), calls(CALL)], "tools": [SUM]}, "chat (messages, tools)", USED[:2]),
    "reasoning": (
        {"messages": [user("1+1?"), assistant("2") | {"thinking": "one more"}]},
        "chat (messages)",
        [user("1+1?"), assistant("2") | {"reasoning_content": "one more"}],
    ),
    "inline reasoning": (
        {"messages": [user("1+1?"), assistant("\n<think>\none\n\nmore\n</think>\n\n2\n")]},
        "chat (messages)",
        [user("1+1?"), assistant("2\n") | {"reasoning_content": "one\n\nmore"}],
    ),
    "empty reasoning": (
        {"prompt": "1+1?", "completion": "<think>\n\n</think>\n\n2"},
        "prompt_completion (prompt, comp",
        PAIR,
    ),
    "reasoning before a call": (
        {"messages": [user("1+1?"), assistant("<think>add</think>") | {"tool_calls": [CALL]}], "tools": [SUM]},
        "chat (messages, tools)",
        [user("1+1?"), CALLED | {"reasoning_content": "add"}],
    ),
    "sharegpt": (
        {"conversations": GPT, "system": "Be brief."},
        "sharegpt (conversations, system)",
        [SYSTEM, *PAIR],
    ),
    "sharegpt with calls": (
        {
            "conversations": [
                GPT[0],
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": '{"sum": "ü"}'},
                GPT[1],
            ],
            "tools": json.dumps([SUM]),
        },
        "sharegpt (conversations, tools)",
        USED,
    ),
    "alpaca": ({"instruction": "1+1?", "output": "2"}, "alpaca (instruction, output)", PAIR),
    "whole alpaca": (
        {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Be brief.", "history": [["a", "b"]]},
        "alpaca (instruction, input, history, output, system)",
        [SYSTEM, user("a"), assistant("b"), user("Add.\n1+1"), assistant("2")],
    ),
    "pair": ({"prompt": "1+1?", "completion": "2", "id": "x"}, "prompt_completion (prompt, completion)", PAIR),
    "pair of turns": (
        {"prompt": [SYSTEM, PAIR[0]], "completion": [PAIR[1]], "tools": None},
        "prompt_completion (prompt, completion, tools)",
        [SYSTEM, *PAIR],
    ),
    "preference": (
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        "preference (prompt, chosen): chosen is learned, rejected is not used",
        PAIR,
    ),
    "preference of conversations": (
        {"prompt": "1+1?", "chosen": PAIR, "rejected": [PAIR[0], assistant("3")]},
        "preference (chosen): chosen is",
        PAIR,
    ),
    "preference of answers": (
        {"prompt": [PAIR[0]], "chosen": [PAIR[1]], "rejected": []},
        "preference (prompt, chosen)",
        PAIR,
    ),
    "columns without values": (
        {"messages": None, "prompt": "1+1?", "completion": "2", "text": None},
        "prompt_completion (prompt, completion)",
        PAIR,
    ),
}


# A column of a table has one type.
_OF_SEVERAL_TYPES = ("parts", "tools", "tools as JSON text")
IN_FILES = [(name, "jsonl") for name in FORMATS] + [
    (name, "parquet") for name in FORMATS if name not in _OF_SEVERAL_TYPES
]


@pytest.mark.parametrize(("name", "ending"), IN_FILES)
def test_recognises_a_format_by_its_columns(tmp_path: Path, name: str, ending: str) -> None:
    record, form, messages = FORMATS[name]
    (row,) = read(str(WRITERS[f"t.{ending}"](tmp_path / f"t.{ending}", [record])))
    assert row.form.startswith(form)
    assert list(row.messages) == messages
    assert row.tools == (TOOLS if record.get("tools") else ())
    assert row.text is None


def test_a_table_gives_no_row_the_keys_of_another(tmp_path: Path) -> None:
    arguments: list[dict[str, Any]] = [{"city": "Rome"}, {"a": 1, "b": {"c": "d"}}, {"b": {"e": "f"}}]
    rows = [{"messages": [user("a"), calls({"name": "f", "arguments": one})], "tools": [SUM]} for one in arguments]
    called = [row.messages[-1]["tool_calls"] for row in read(str(write_parquet(tmp_path / "t.parquet", rows)))]
    assert [call["function"]["arguments"] for (call,) in called] == arguments


def test_recognises_plain_text_beside_what_describes_it(tmp_path: Path) -> None:
    page = {"text": "One page.", "url": "https://x", "source": "web"}
    (row,) = read(str(tiny.write_rows(tmp_path / "t.jsonl", [page])))
    assert (row.text, row.messages, row.ignored, row.answer) == ("One page.", (), ("source", "url"), "One page.")
    assert row.form == "text (text): every token is learned"


def test_named_format_reads_what_columns_alone_do_not_tell(tmp_path: Path) -> None:
    path = str(tiny.write_rows(tmp_path / "t.jsonl", [{"text": "a", "label": "b"}, {"text": "c", "output": "d"}]))
    assert [row.text for row in read(path, form=Form("text"))] == ["a", "c"]
    both = {"messages": CHAT, "prompt": "1+1?", "completion": "2"}
    (row,) = read(str(tiny.write_rows(tmp_path / "u.jsonl", [both])), form=Form("prompt_completion"))
    assert (list(row.messages), row.ignored) == (PAIR, ("messages",))


@pytest.mark.parametrize(
    ("format", "words"),
    [
        (
            "alpaca",
            "data.format: alpaca: {path}:1: has no instruction; its columns are question, output: write data.map",
        ),
        ("alpaca", ": write data.map: {{instruction: question}}"),
        ("chat", "data.format: chat: {path}:1: has no messages; its columns are question, output"),
        ("text", "has no text"),
    ],
)
def test_named_format_without_its_columns_names_the_nearest_fix(tmp_path: Path, format: str, words: str) -> None:
    path = tiny.write_rows(tmp_path / "t.jsonl", [{"question": "a", "output": "b"}])
    with pytest.raises(FieldError) as caught:
        read(str(path), form=Form(format))
    assert words.format(path=path) in str(caught.value)


def test_map_names_and_joins_columns(tmp_path: Path) -> None:
    grade = {"question": "1+1?", "hint": " {x} ", "grade": 3, "answer": "2", "note": None}
    path = str(tiny.write_rows(tmp_path / "t.jsonl", [grade]))
    (row,) = read(path, form=Form(map={"prompt": "question", "completion": "answer"}))
    assert (list(row.messages), row.ignored) == (PAIR, ("grade", "hint", "note"))
    assert row.form == "prompt_completion (prompt from 'question', completion from 'answer')"
    joined = {"instruction": "{question} ({grade}){note}\n{hint}\n", "output": "answer"}
    (row,) = read(path, form=Form(map=joined))
    assert (row.prompt[0]["content"], row.ignored) == ("1+1? (3)\n {x}", ())
    turns = str(tiny.write_rows(tmp_path / "u.jsonl", [{"talk": GPT, "task": "Be brief."}]))
    (row,) = read(turns, form=Form(map={"conversations": "talk", "system": "task"}))
    assert (list(row.messages), row.ignored) == ([SYSTEM, *PAIR], ())


def test_map_leaves_a_source_of_another_format_as_it_is(tmp_path: Path) -> None:
    replay = str(tiny.write_rows(tmp_path / "replay.jsonl", [{"messages": CHAT}]))
    (row,) = read(replay, form=Form(map={"prompt": "question", "completion": "answer"}))
    assert row.form == "chat (messages)"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"prompt": "qestion", "completion": "answer"},
            "data.map.prompt: {path}:1: there is no column 'qestion' (questio",
        ),
        ({"prompt": "qestion", "completion": "answer"}, "; did you mean 'question'?"),
        ({"prompt": "{question}{hints}"}, "there is no column 'hints' (question, answer, deep)"),
        ({"prompt": "{question} {deep}"}, "data.map.prompt: {path}:1: column 'deep' is a list; text is expected"),
    ],
)
def test_map_to_a_column_that_is_not_there_names_the_nearest(
    tmp_path: Path, columns: dict[str, str], words: str
) -> None:
    path = tiny.write_rows(tmp_path / "t.jsonl", [{"question": "a", "answer": "b", "deep": []}])
    with pytest.raises(FieldError) as caught:
        read(str(path), form=Form(map=columns))
    assert words.replace("{path}", str(path)) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"map": {"promt": "x"}}, "data.map.promt: is no field of rows: messages, .*; did you mean 'prompt'"),
        ({"map": {"chosen": "x", "text": "y"}}, "data.map: no format has the fields chosen and text together"),
        (
            {"map": {"prompt": "x"}, "format": "alpaca"},
            "data.map.prompt: is no field of data.format alpaca: instruction",
        ),
    ],
)
def test_map_of_what_is_no_field_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(FieldError, match=words):
        Form.of(Data(train="t.jsonl", **data))


def test_finds_a_bad_row_in_every_kind_of_file(tmp_path: Path) -> None:
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(RecipeError, match=rf"{name}:\d: completion: is (empty|null)"):
            read(str(WRITERS[name](tmp_path / name, [PAIRS[0], {"id": "c", "prompt": "x", "completion": None}])))


BROKEN = {
    "t.jsonl": [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"t.jsonl:2: not JSON: .* column \d+"),
        (b'[\n{"prompt": "a"}]', r"t.jsonl:1: not JSON.*a JSON list is read from a file that ends in .json"),
        (b"", "t.jsonl: is empty"),
        (b"\n\n", "t.jsonl: is empty"),
        (b'{"prompt": "caf\xe9"}\n', r"t.jsonl:1: not UTF-8 text \(byte 16"),
    ],
    "t.csv": [
        (b"", "t.csv: is empty"),
        (b"prompt,completion\n", "t.csv: is empty"),
        (b"prompt,completion\na,b\na,b,c\n", "t.csv:3: 3 cells where the header names 2 columns"),
        (
            b"question,answer\na,b\n",
            "t.csv:2: columns question, answer: write data.map: {prompt: question, completion: answer}",
        ),
        (b'prompt,completion\na,"b\n', "t.csv:2: not CSV"),
        (b"prompt,completion\ncaf\xe9,b\n", "not UTF-8 text"),
    ],
    "t.parquet": [(b"PAR1 nothing", "t.parquet: not a Parquet file")],
    "t.jsonl.gz": [(b"not gzip", "t.jsonl.gz: cannot be read: Not a gzipped file")],
    "t.json": [
        (b"[]", "t.json: is empty"),
        (b'[{"prompt": "a", "completion": "b"}, {"prompt": "a"}]', "t.json:2: columns prompt: completion is missing"),
        (b'{"prompt": "a", "completion": "b"}', "t.json: is one JSON object, with the keys prompt, completion; a list"),
        (b'"rows"', "t.json: is JSON, but no list of rows"),
        (b'[{"prompt": "a",\n "completion" 3}]', "t.json: not JSON: Expecting ':' delimiter at line 2 column 15"),
        (b'[{"prompt": "a", "completion": "b"}', "t.json: not JSON: it ends too early at line 1 column 36"),
        (b'[{"prompt": "a", "completion": "b"}] []', "t.json:1: not JSON: something follows the list"),
        (b'[{"prompt": "caf\xe9"}]', r"t.json: not UTF-8 text \(byte 17\)"),
    ],
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
        (
            ValueError("Unknown split \"train\". Should be one of ['training', 'test'].\nmore"),
            "me/set: has no split 'train'; it has training, test; did you mean 'training'?",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"),
            "me/set: has the configurations main, socratic; name one of them, as me/set:main:train",
        ),
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
