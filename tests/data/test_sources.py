"""Files that cannot be read, whatever is wrong with them: one line with the place, and never a traceback."""

import gzip
import json
import os
import random
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from llmtune import recipe
from llmtune.data.rows import Form, iterate, read
from llmtune.data.sources import source_files, text_files, unpacking
from llmtune.errors import RecipeError
from llmtune.recipe.paths import absolute_source
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


GOOD = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
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
    file = tiny.write_rows(tmp_path / "t.jsonl", [CHAT if "messages" in HALVES[key] else GOOD, HALVES[key]])
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
    monkeypatch.setattr(unpacking, "_GROWTH_FROM", 1 << 20)
    blank = write(tmp_path / "blank.jsonl.gz", gzip.compress((b" " * 63 + b"\n") * (1 << 15)))
    assert "unpack to over" in refuse(blank)
    monkeypatch.setattr(unpacking, "LONGEST_LINE", 1 << 20)
    line = write(tmp_path / "line.jsonl.gz", gzip.compress(b" " * (2 << 20)))
    assert "line.jsonl.gz:1: the line is longer than 1 MiB" in refuse(line)
    assert len(read(str(write(tmp_path / "rows.jsonl.gz", gzip.compress(PAIRS))))) == 400
    for name, content in (
        ("l.json.gz", gzip.compress(b"[" + b" " * (2 << 20))),
        ("t.txt.zst", zstd((b" " * 32767 + b"\n") * 64)),
    ):
        assert "unpack to over" in refuse(write(tmp_path / name, content))
    huge = refuse(write(tmp_path / "t.txt", b"x" * (2 << 20)))
    assert huge == f"{tmp_path}/t.txt:1: the line is longer than 1 MiB; divide it into shorter ones"


def zstd(content: bytes) -> bytes:
    """Content as a .zst file."""
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


TABLE = b'prompt\tcompletion\n0?\t0\n"1\n?"\t1\n'
LIST = b'\xef\xbb\xbf [{"prompt": "0?", "completion": "0"},\r\n {"prompt": "1\\n?", "completion": "1"}]\n'
TEXT_FILES = {
    ".jsonl": LIST[5:-2].replace(b",\r\n ", b"\r\n\r\n"),
    ".json": LIST,
    ".csv": TABLE.replace(b"\t", b","),
    ".tsv": TABLE,
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ending", TEXT_FILES)
def test_reads_every_kind_of_text_file_packed_or_not(tmp_path: Path, ending: str, packing: str) -> None:
    content = PACKINGS[packing](TEXT_FILES[ending])
    rows = read(str(write(tmp_path / f"t{ending}{packing}", content)))
    assert [(row.prompt[0]["content"], row.answer) for row in rows] == [("0?", "0"), ("1\n?", "1")]
    assert [row.where.rsplit(":", 1)[1] for row in rows] == {".json": ["1", "2"], ".jsonl": ["1", "3"]}.get(
        ending, ["2", "3"]
    )
    if packing:
        assert refuse(write(tmp_path / f"cut{ending}{packing}", content[:-9]))
        assert "cannot be read" in refuse(write(tmp_path / f"junk{ending}{packing}", b"junk"))


ODD_JSON = [
    b'[{"prompt": "\\ud83d\\ude00 \xc3\xa9\\"]}", "completion": "b", "n": [-1.5e3, 12345, true, null, {"a": {}}]}, \n'
    b'{"prompt": "c", "completion": "d", "n": []}]',
    b'{"n": 12, "data": [{"prompt": "a", "completion": "b"}], "more": {"x": [1, 2.5]}}',
    b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}',
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("content", ODD_JSON)
def test_reads_a_json_file_in_pieces_of_any_size(
    tmp_path: Path, content: bytes, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "_BUFFER", size)
    try:
        value = json.loads(content)
    except json.JSONDecodeError:
        value = [json.loads(line) for line in content.splitlines()]
    wanted = value["data"] if isinstance(value, dict) else value
    rows = read(str(write(tmp_path / "t.json", content)))
    assert [(row.prompt[0]["content"], row.answer) for row in rows] == [
        (row["prompt"], row["completion"]) for row in wanted
    ]


def test_reads_a_json_list_without_holding_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "_BUFFER", 1 << 16)
    row = json.dumps({"prompt": "x" * 4000, "completion": "b"})
    path = write(tmp_path / "t.json", f"[{', '.join([row] * 2000)}]".encode())
    tracemalloc.start()
    assert sum(1 for _ in iterate(str(path))) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 8


def test_cuts_a_text_file_into_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "\n  one\n\n\ntwo \n\f\n\nthree\n<|endoftext|>\n" + "four.\n" * 30 + "\n\nfive\n\n"
    path = str(write(tmp_path / "t.txt", content.encode()))
    four = ("four.\n" * 30).rstrip()
    whole = ["  one\n\n\ntwo", "three", f"{four}\n\n\nfive"]
    assert [row.text for row in read(path)] == whole
    assert not any(row.goes_on or row.continues for row in read(path))
    monkeypatch.setattr(text_files, "LONG_TEXT", 100)
    rows = read(path)
    assert [(row.text, row.where.rsplit(":", 1)[1]) for row in rows] == list(
        zip([*whole[:2], f"{four}\n\n\n", "five"], ["2", "8", "10", "42"], strict=True)
    )
    assert [(row.goes_on, row.continues) for row in rows] == [(False, "")] * 2 + [(True, ""), (False, rows[2].where)]
    monkeypatch.setattr(text_files, "LONGEST_TEXT", 120)
    rows = read(path)
    assert [str(row.text).count("four.") for row in rows] == [0, 0, 21, 9]
    assert "".join(str(row.text) for row in rows[2:]) == whole[2]
    assert [row.goes_on for row in rows[2:]] == [True, False]


def test_reads_folders_and_patterns_in_the_order_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my [rows]"
    for name, start in (("b.jsonl", 2), ("a.jsonl", 0), ("c/d.jsonl", 4)):
        tiny.write_rows(folder / name, tiny.sums(2, start))
    write(folder / "README.md", b"no rows")
    write(folder / ".hidden.jsonl", b"{")
    monkeypatch.chdir(folder)
    for source, count in (("a.jsonl", 2), ("../my [rows]", 4), ("[ab].jsonl", 4), ("*.jsonl", 4), ("**/*.jsonl", 6)):
        rows = read(source)
        assert [row.id for row in rows] == [f"sum-{n}" for n in range(count)]
        assert len({row.where for row in rows}) == count
        absolute = absolute_source(source)
        monkeypatch.chdir("/")
        assert [row.id for row in read(absolute)] == [row.id for row in rows]
        assert len(source_files(absolute)) == count / 2
        monkeypatch.chdir(folder)
    assert read("*.jsonl")[2].where == "b.jsonl:1"
    assert "no file matches *.csv (looked for" in refuse("*.csv")
    assert "*: matches README.md, a kind of file that holds no rows; try .jsonl, .json" in refuse("*")
    assert "is a folder without a file that ends in .jsonl" in refuse(tmp_path)
    assert f"write {tmp_path}/**/*.jsonl for the files below it" in refuse(tmp_path)
    write(folder / "b.jsonl", b'{"messages": []}')
    two = "b.jsonl:1: is chat, but a.jsonl:1 is prompt_completion; make two files of them"
    assert refuse("*.jsonl") == two
    write(folder / "b.jsonl", b'{"messages": [], "prompt": "a", "completion": "b"}')
    assert refuse("*.jsonl") == f"{two}, or write data.format: prompt_completion"


def test_a_recipe_finds_patterns_and_splits_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_rows(tmp_path / "a [1]" / "set" / "train-1.jsonl", tiny.sums(2))
    tiny.write_rows(tmp_path / "a [1]" / "set" / "test-1.jsonl", tiny.sums(1, 2))
    for train, count in (("set/train*.jsonl", 2), ("set:test", 1), ("set", 2)):
        file = tmp_path / "a [1]" / "recipe.yaml"
        file.write_text(json.dumps({"model": {"base": "x"}, "data": {"train": train}, "method": "lora"}))
        assert len(read(str(recipe.load(file).data.train))) == count


def test_a_folder_whose_names_tell_splits_gives_one_of_them(tmp_path: Path) -> None:
    for name, start in (("train-00000.jsonl", 0), ("train-00001.jsonl", 2), ("test.jsonl", 4), ("labels.jsonl", 6)):
        tiny.write_rows(tmp_path / name, tiny.sums(2, start))
    assert [row.id for row in read(str(tmp_path))] == [f"sum-{n}" for n in range(4)]
    assert [row.id for row in read(str(tmp_path), "test")] == ["sum-4", "sum-5"]
    assert [row.id for row in read(f"{tmp_path}:test")] == ["sum-4", "sum-5"]
    assert refuse(f"{tmp_path}:dev") == f"{tmp_path}:dev: has no split 'validation'; its files are of test, train"


def test_reads_what_save_to_disk_wrote(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(tiny.sums(3))
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, test=rows.select([2])).save_to_disk(str(tmp_path / "two"))
    assert [(row.id, row.where) for row in read(str(tmp_path / "one"))][1] == ("sum-1", f"{tmp_path}/one:2")
    assert (
        [row.id for row in read(f"{tmp_path}/two:test")]
        == ["sum-2"]
        == [row.id for row in read(f"{tmp_path}/two", "test")]
    )
    assert len(read(f"{tmp_path}/two")) == 3
    assert {path.suffix for path in source_files(f"{tmp_path}/two:test")} == {".arrow", ".json"}
    assert "two:tset: has no split 'tset'; it has test, train; did you mean 'test'?" in refuse(f"{tmp_path}/two:tset")
    assert "one:test: one has no splits; write " in refuse(f"{tmp_path}/one:test")
    write(tmp_path / "one" / "data-00000-of-00001.arrow", b"junk")
    assert f"{tmp_path}/one: not a saved data set, or a damaged one" in refuse(tmp_path / "one")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A data set of two configurations and two splits, read by the real library in place of one of the Hub."""
    folder, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    for name in ("main", "socratic"):
        tiny.write_rows(folder / name / "train.jsonl", [{"question": f"{name}?", "answer": name}] * 2)
        tiny.write_rows(folder / name / "test.jsonl", [{"question": f"{name}?", "answer": name}])
    parts = [{"config_name": name, "data_dir": name} for name in ("main", "socratic")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(parts)}\n---\n")
    load, names = datasets.load_dataset, datasets.get_dataset_config_names

    def load_here(name: str, *configuration: str, **options: Any) -> Any:
        if name != "openai/gsm8k":
            return load(name, *configuration, **options)
        assert list(options) == ["split"]
        return load(str(folder), *configuration, cache_dir=str(cache), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_here)
        patch.setattr(datasets, "get_dataset_config_names", lambda _: names(str(folder)))
        yield


@pytest.mark.parametrize(
    ("suffix", "split", "count"), [(":main:train", "test", 2), (":socratic:test", "train", 1), (":main", "test", 1)]
)
def test_reads_a_configuration_of_a_hub_data_set(hub: None, suffix: str, split: str, count: int) -> None:
    form = Form(map={"prompt": "question", "completion": "answer"})
    rows = read(f"openai/gsm8k{suffix}", split, form)
    assert [row.answer for row in rows] == [suffix.split(":")[1]] * count


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        ("", "has the configurations main, socratic; name one of them, as openai/gsm8k:main:train"),
        (":train", "has the configurations main, socratic; name one of them, as openai/gsm8k:main:train"),
        (":mian:train", "has no configuration 'mian'; it has main, socratic; did you mean 'main'?"),
        (":main:validation", "has no split 'validation'; it has train, test"),
    ],
)
def test_names_the_configurations_and_splits_that_a_hub_data_set_has(hub: None, suffix: str, words: str) -> None:
    assert refuse(f"openai/gsm8k{suffix}") == f"openai/gsm8k{suffix}: {words}"


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
