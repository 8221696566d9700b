"""Data files that nobody writes on purpose: rows in every kind of file, with damage to structure and bytes."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from tests.fuzz.row_cases import TEXTS, rarely, tables


@dataclass(frozen=True)
class DataFile:
    """A data file's ending and bytes."""

    ending: str
    content: bytes


Rows = list[dict[str, Any]]


@st.composite
def _json_lines(draw: st.DrawFn, rows: Rows) -> bytes:
    escaped = draw(st.booleans())
    indent = 1 if rarely(draw, 20) else None
    lines = [json.dumps(row, ensure_ascii=escaped, indent=indent) for row in rows]
    if rarely(draw, 20):  # a key that occurs twice
        lines[0] = lines[0].replace(
            "{", draw(st.sampled_from(['{"prompt": "", ', '{"messages": [], ', '{"id": 1, '])), 1
        )
    end = draw(st.sampled_from(["\r\n", "\n\n", "\r", "\u2028\n", ",\n"])) if rarely(draw, 5) else "\n"
    last = draw(st.sampled_from(["\0", "null", "[", "{}"])) if rarely(draw, 10) else draw(st.sampled_from(["", end]))
    return (end.join(lines) + last).encode("utf-8", "surrogatepass")


@st.composite
def _json_list(draw: st.DrawFn, rows: Rows) -> bytes:
    text = json.dumps(rows, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    return (f'{{"data": {text}}}' if rarely(draw, 4) else text).encode("utf-8", "surrogatepass")


_HEADERS = [["prompt", "completion"]] * 4 + [
    ["prompt", "completion", "id"],
    ["prompt", "completion", "prompt"],
    ["Prompt", "completion"],
    ["messages"],
    [""],
    [],
    ["prompt", "completion", ""],
    [" prompt", "completion "],
]
_CELLS = st.sampled_from([*TEXTS, '"', 'a"b', "a,b", "x" * 140_000])


@st.composite
def _csv(draw: st.DrawFn, rows: Rows) -> bytes:
    header = draw(st.sampled_from(_HEADERS))
    table = [] if rarely(draw, 20) else [header]
    for row in rows:
        cells = [str(row.get(name, row.get("messages", "x"))) for name in header]
        if cells and rarely(draw, 8):
            cells[draw(st.integers(0, len(cells) - 1))] = draw(_CELLS)
        table.append(cells[:-1] if rarely(draw, 50) else cells)
    text = io.StringIO(newline="")
    delimiter, end = draw(st.sampled_from(",,;\t,,")), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    csv.writer(
        text,
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        lineterminator=end,
        delimiter=delimiter,
        escapechar="\\",
    ).writerows(table)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _without_surrogates(value: Any) -> Any:
    """A value that Arrow can hold: UTF-8 text and 64-bit numbers."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(inner) for inner in value]
    return 7 if isinstance(value, int) and abs(value) >= 1 << 62 else value


def _odd_tables(text: list[str]) -> list[dict[str, Any]]:
    """Columns of every type that Arrow has and rows may not have."""
    some = len(text)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]
    silent = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    maps = pa.array([[("user", "a"), ("assistant", "b")]] * some, pa.map_(pa.string(), pa.string()))
    return [
        {"prompt": pa.array(text).dictionary_encode(), "completion": pa.array(text, pa.large_string())},
        {"prompt": pa.array([value.encode() for value in text]), "completion": text},
        {"prompt": pa.array([value.encode() + b"\xff" for value in text]), "completion": text},
        {"prompt": text, "completion": pa.array([None] * some)},
        {"prompt": text, "completion": text, "": text},
        *({"prompt": pa.array(range(some), kind), "completion": text} for kind in _TYPES),
        {"messages": maps},
        {"messages": pa.array([turns] * some)},
        {"messages": pa.array([silent] * some)},
        {"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())},
        {},
        {"prompt": pa.array([1.5] * some), "completion": text, "id": pa.array([{"a": 1}] * some)},
        {"prompt": text, "completion": text, "time": pa.array([1 << 62] * some, pa.timestamp("ns"))},
        {"prompt": text, "completion": text, "time": pa.array([-(1 << 62)] * some, pa.timestamp("s"))},
    ]


_TYPES = (pa.int64(), pa.timestamp("ns"), pa.duration("us"), pa.int32(), pa.date32(), pa.float64())


@st.composite
def _parquet(draw: st.DrawFn, rows: Rows) -> bytes:
    text = [str(number) for number in range(len(rows))]
    try:
        if draw(st.booleans()):
            table = pa.Table.from_pylist(_without_surrogates(rows))
        elif rarely(draw, 10):
            table = pa.table([pa.array(text)] * 3, names=["prompt", "completion", "prompt"])
        else:
            table = pa.table(draw(st.sampled_from(_odd_tables(text))))
        file = io.BytesIO()
        pq.write_table(table, file, compression=draw(st.sampled_from(["snappy", "zstd", "none", "gzip"])))
    except (
        pa.ArrowException,
        TypeError,
        ValueError,
        OverflowError,
    ):  # rows of several types, which Parquet cannot hold
        return b"PAR1 no table PAR1"
    return file.getvalue()


_PIECES = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\x1a",
    b"\xef\xbb\xbf",
    b"\n",
    b'"',
    b"\\",
    b"\r",
    b"\\ud800",
]
_ENCODINGS = ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7"]


def _encode_otherwise(draw: st.DrawFn, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode(draw(st.sampled_from(_ENCODINGS)), "replace")


def _change_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 30)) if changed else 0):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


def _insert(draw: st.DrawFn, content: bytes) -> bytes:
    start = draw(st.integers(0, len(content)))
    return content[:start] + draw(st.sampled_from(_PIECES)) + content[start + draw(st.integers(0, 1)) :]


_DAMAGE: list[Callable[[st.DrawFn, bytes], bytes]] = [
    lambda draw, content: content[: draw(st.integers(0, len(content)))],
    _insert,
    lambda draw, content: b"\xef\xbb\xbf" + content,
    _encode_otherwise,
    lambda draw, content: content.replace(b"\n", b"\r\n"),
    lambda draw, content: content * draw(st.integers(2, 5)),
    lambda draw, content: draw(st.binary(max_size=300)),
    lambda draw, content: b"",
    _change_bytes,
]
"""What happens to files: cut, changed, encoded otherwise, doubled, replaced."""


@st.composite
def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    return draw(st.sampled_from(_DAMAGE))(draw, content)


_WRITERS = {"jsonl": _json_lines, "json": _json_list, "csv": _csv, "parquet": _parquet, "jsonl.gz": _json_lines}


@st.composite
def files(draw: st.DrawFn) -> DataFile:
    """Any data file."""
    ending = draw(st.sampled_from(["jsonl"] * 3 + ["json", "csv", "parquet", "jsonl.gz"]))
    content = draw(_WRITERS[ending](draw(tables())))
    if rarely(draw, 3):
        content = draw(_damaged(content))
    if ending == "jsonl.gz":
        content = gzip.compress(content, mtime=0)
        if rarely(draw, 4):
            content = draw(_damaged(content))
    return DataFile(ending, content)


CASES = files()
"""Any data file with any rows."""
