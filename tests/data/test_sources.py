"""Files that cannot be read, whatever is wrong with them: one line with the place, and never a traceback."""

import gzip
import json
import os
import random
import zlib
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from llmtune.data.rows import read
from llmtune.data.sources import files
from llmtune.errors import RecipeError
from tests.support import tiny

PAIR = b'{"prompt": "a?", "completion": "b"}\n'
PAIRS = b"".join(b'{"prompt": "%d?", "completion": "%d"}\n' % (n, n * n) for n in range(400))


def refuse(path: Path | str) -> str:
    """The one line that refuses a source."""
    with pytest.raises(RecipeError) as caught:
        read(str(path))
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable()
    assert len(message) < 1000
    return message


def write(path: Path, content: bytes) -> Path:
    """A file of these bytes."""
    path.write_bytes(content)
    return path


HALVES: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a \ud83d", "completion": "b"},
    "completion": {"prompt": "a", "completion": "b\udc00"},
    "id": {"prompt": "a", "completion": "b", "id": "\ud800"},
    "the name of a column": {"prompt": "a", "completion": "b", "x\ud800": 1},
    "messages[0].content": {"messages": [{"role": "user", "content": "\udfff"}, {"role": "assistant", "content": "b"}]},
    "the name of a key in messages": {
        "messages": [{"role": "user", "content": "a", "\ud800": 1}, {"role": "assistant", "content": "b"}]
    },
}


@pytest.mark.parametrize("key", HALVES)
def test_names_the_row_with_half_of_a_character(tmp_path: Path, key: str) -> None:
    file = tiny.write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}, HALVES[key]])
    message = refuse(file)
    assert message.startswith(f"{file}:2: {key}: holds half of a character (\\ud")
    assert "remove it or restore the character" in message


def test_takes_a_pair_of_halves_as_the_character_that_it_is(tmp_path: Path) -> None:
    (row,) = read(str(write(tmp_path / "t.jsonl", b'{"prompt": "\\ud83d\\ude00", "completion": "b"}')))
    assert row.prompt[0]["content"] == "\U0001f600"


def test_reads_a_csv_cell_of_any_length_that_a_row_may_have(tmp_path: Path) -> None:
    (row,) = read(str(write(tmp_path / "t.csv", b"prompt,completion\n" + b"x" * 200_000 + b",b\n")))
    assert len(row.prompt[0]["content"]) == 200_000


@pytest.mark.parametrize("seed", range(40))
def test_refuses_a_gzip_file_with_a_flipped_bit(tmp_path: Path, seed: int) -> None:
    damaged = bytearray(gzip.compress(PAIRS, mtime=0))
    draw = random.Random(seed)
    damaged[draw.randrange(10, len(damaged))] ^= 1 << draw.randrange(8)
    try:
        zlib.decompress(bytes(damaged), 31)
    except zlib.error:
        assert str(tmp_path / "t.jsonl.gz") in refuse(write(tmp_path / "t.jsonl.gz", bytes(damaged)))


@pytest.mark.parametrize("cut", [1, 9, 12, 100, 400])
def test_refuses_a_gzip_file_that_ends_early(tmp_path: Path, cut: int) -> None:
    assert "cannot be read" in refuse(write(tmp_path / "t.jsonl.gz", gzip.compress(PAIRS)[:cut]))


def test_refuses_a_file_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_GROWTH_FROM", 1 << 20)
    blank = write(tmp_path / "blank.jsonl.gz", gzip.compress(b"\n" * (2 << 20)))
    assert "unpack to over" in refuse(blank)
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    line = write(tmp_path / "line.jsonl.gz", gzip.compress(b" " * (2 << 20)))
    assert "line.jsonl.gz:1: the line is longer than 1 MiB" in refuse(line)
    assert len(read(str(write(tmp_path / "rows.jsonl.gz", gzip.compress(PAIRS))))) == 400


DAMAGED = {
    "deep": (
        "t.jsonl",
        PAIR + b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        ":2: cannot be read: lists and objects",
    ),
    "digits": ("t.jsonl", PAIR + b'{"x": ' + b"9" * 5000 + b"}", ":2: cannot be read: a number has 5000 digits"),
    "key twice": (
        "t.jsonl",
        PAIR + b'{"prompt": "a", "prompt": "b"}',
        ":2: cannot be read: the key 'prompt' is there tw",
    ),
    "UTF-16": ("t.jsonl", PAIR.decode().encode("utf-16"), ":1: not UTF-8 text"),
    "CSV not UTF-8": ("t.csv", b"prompt,completion\na,b\n" + b"c,d\n" * 9000 + b"caf\xe9,x\n", ":9003: not UTF-8 text"),
    "CSV open quote": ("t.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', ":3: not CSV: unexpected end of data"),
    "CSV column twice": (
        "t.csv",
        b"prompt,prompt,completion\na,b,c\n",
        ":1: the header names the column 'prompt' twice",
    ),
    "Parquet": ("t.parquet", b"PAR1junkPAR1", ": not a Parquet file, or a damaged one"),
    "Parquet empty": ("t.parquet", b"", ": not a Parquet file, or a damaged one"),
    "Arrow": ("t.arrow", b"ARROW1\0\0junk", ": not an Arrow file, or a damaged one"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_names_the_place_of_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    file, content, words = DAMAGED[name]
    assert f"{tmp_path / file}{words}" in refuse(write(tmp_path / file, content))


def test_refuses_a_parquet_file_whose_pages_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = [{"prompt": f"{n}?", "completion": str(n)} for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[40:80] = b"\xff" * 40
    assert "damaged" in refuse(write(path, bytes(content)))


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    schema = pyarrow.schema([("prompt", pyarrow.string()), ("completion", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "t.parquet")
    assert refuse(tmp_path / "t.parquet") == f"{tmp_path}/t.parquet: is empty: it has no rows"


def test_reads_an_arrow_file(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a?"], "completion": ["b"]})
    with pyarrow.ipc.new_stream(tmp_path / "t.arrow", table.schema) as stream:
        stream.write_table(table)
    (row,) = read(str(tmp_path / "t.arrow"))
    assert (row.where, row.answer) == (f"{tmp_path}/t.arrow:1", "b")


@pytest.mark.parametrize("name", ["[a]*.parquet", "a b?.parquet", "ü.parquet"])
def test_reads_a_parquet_file_of_any_name(tmp_path: Path, name: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a?"], "completion": ["b"]}), tmp_path / name)
    assert len(read(str(tmp_path / name))) == 1


def test_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "pipe.jsonl: is not a regular file" in refuse(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "zero.jsonl: is not a regular file" in refuse(tmp_path / "zero.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    assert "gone.jsonl: is a link to nowhere.jsonl, which does not exist" in refuse(tmp_path / "gone.jsonl")
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    assert "circle.jsonl: is a link to circle.jsonl" in refuse(tmp_path / "circle.jsonl")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x" * 300 + ".jsonl", "File name too long"),
        ("~nosuchuser/x.jsonl", "knows no home folder for ~nosuchuser"),
        ("a\0b.jsonl", r"no file a\x00b.jsonl"),
        ("a\nb.jsonl", r"no file a\nb.jsonl"),
        ("\x1b[31mred.jsonl", r"no file \x1b[31mred.jsonl"),
        (os.fsdecode(b"bad\xff.jsonl"), "the name is not UTF-8"),
    ],
)
def test_refuses_a_name_that_names_no_file(source: str, words: str) -> None:
    assert words in refuse(source)


def test_names_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = write(tmp_path / "t.jsonl", PAIR)
    monkeypatch.setattr(Path, "open", closed)
    assert refuse(file) == f"{file}: cannot be read: Permission denied"


def test_places_stay_right_in_a_file_with_every_kind_of_line_end(tmp_path: Path) -> None:
    rows = read(str(write(tmp_path / "t.csv", b'prompt,completion\r"a\nb",c\r\nd,e\nf,g\r')))
    assert [(row.where[-2:], row.answer) for row in rows] == [(":2", "c"), (":4", "e"), (":5", "g")]
    spaced = json.dumps({"prompt": "a\u2028b\x85c", "completion": "d"}, ensure_ascii=False).encode()
    assert [row.where[-2:] for row in read(str(write(tmp_path / "t.jsonl", spaced + b"\r\n\r\n" + spaced)))] == [
        ":1",
        ":3",
    ]
