"""Encoded rows are kept on disk: equal to rows encoded at once, made once, gone on with, and never believed damaged."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llmtune.data.batches.rows import ExampleRows, row_lengths, row_targets
from llmtune.data.encoding.encode import IGNORED, Example, encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.gate import check_data
from llmtune.data.overlap import dedup_key, hold_out
from llmtune.data.row import Row
from llmtune.data.rows import read
from llmtune.data.store import build, entries
from llmtune.data.store import read as reading
from llmtune.data.store.batches import Job, encode_batch, write_part
from llmtune.data.store.encoded import EncodedRows, TokenIds
from llmtune.data.store.entries import Entry, make_room
from llmtune.data.store.read import read_part
from llmtune.data.store.rows import store_rows
from llmtune.errors import LlmtuneError, MachineError, RecipeError
from llmtune.recipe.data import Data
from tests.support import tiny

ROWS = 23
JOB = Job(tiny.tokenizer(), frozenset({2}), Rules(64), 500)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache into which even few rows go, in batches of five."""
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    for name, value in (("IN_MEMORY", 3), ("BATCH_ROWS", 5)):
        monkeypatch.setattr(f"llmtune.data.store.rows.{name}", value)
    return tmp_path / "cache" / "rows"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places from which batches are encoded in this process, as they are."""
    places: list[int] = []

    def noted(rows: Any, first: int, job: Job) -> Any:
        places.append(first)
        return encode_batch(rows, first, job)

    monkeypatch.setattr(build, "encode_batch", noted)
    return places


def write(folder: Path, records: list[dict[str, Any]] | None = None) -> Data:
    """A data section on rows, of which some are too long, cut, or have several answers."""
    pairs = [*tiny.sums(ROWS - 3), *({"prompt": text, "completion": "x"} for text in ("p" * 90, "é <|im_end|>"))]
    records = records or [
        *map(as_chat, pairs),
        {"id": "two", "messages": as_chat(pairs[0])["messages"] * 2, "extra": 1},
    ]
    return Data(train=str(tiny.write_rows(folder / "train.jsonl", records)), max_length=64)


def as_chat(pair: dict[str, Any]) -> dict[str, Any]:
    """A row of prompt and completion as a conversation."""
    turns = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]
    return {"id": pair.get("id"), "messages": turns}


def encoded_files(cache: Path) -> list[Path]:
    """The tables of encoded rows in the cache."""
    return sorted(cache.glob("encoded-*/rows.arrow"))


def test_stored_examples_equal_those_encoded_at_once(tmp_path: Path, cache: Path) -> None:
    data = write(tmp_path)
    rows = read(str(data.train))
    expected = encode(rows, JOB.tokenizer, {2}, JOB.rules)
    stored = read_part(data, "train")
    assert stored[:] == rows == list(read_part(data, "train"))
    part = build.encode_rows(stored, JOB)
    assert stored.stored.file is not None
    assert len(encoded_files(cache)) == 1
    assert part.examples[:] == expected.examples == [*part.examples]
    assert replace(part.notes, examples=expected.examples) == expected
    assert part.special == [rows[-2].id]
    assert part.examples.lengths.tolist() == [len(example.input_ids) for example in expected.examples]
    assert part.examples.supervised.tolist() == [example.supervised for example in expected.examples]
    assert [rows[place].where for place in part.examples.rows] == [example.where for example in expected.examples]
    few = stored.take(np.array([20, 3]))
    alone = build.encode_rows(few, JOB)
    assert alone.examples[:] == encode([rows[20], rows[3]], JOB.tokenizer, {2}, JOB.rules).examples
    assert len(encoded_files(cache)) == 1, "few rows are encoded without the disk"
    assert stat_mode(cache) == 0o700


def test_few_long_rows_are_encoded_once_too(
    tmp_path: Path, cache: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path)
    monkeypatch.setattr("llmtune.data.store.rows.IN_MEMORY", ROWS)
    size = read_part(data, "train").size
    for limit, times in ((size, 2), (size - 1, 1)):
        calls.clear()
        monkeypatch.setattr("llmtune.data.store.rows.IN_MEMORY_BYTES", limit)
        parts = [build.encode_rows(read_part(data, "train"), JOB) for _ in range(2)]
        assert parts[0].examples[:] == parts[1].examples[:]
        assert calls.count(0) == times
        assert len(encoded_files(cache)) == 2 - times


def stat_mode(path: Path) -> int:
    """The permissions of a file or folder."""
    return path.stat().st_mode & 0o777


def test_rows_of_every_kind_come_back_as_they_were(cache: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, 2.5, None], "b": "\ud800"}}}
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    rows = [Row(f"r{n}", messages, f"t:{n}", ("x",), ({"type": "function"},), None, "s") for n in range(4)]
    rows += [Row("text", (), "t:9", text="plain")]
    stored = store_rows(rows, Entry("rows", {"a": 1}))
    assert stored[:] == rows
    assert (stored.ignored, stored.counts("source")) == (["x"], {"s": 4, "": 1})
    assert (stored.duplicates, len(np.unique(stored.contents))) == (3, 2)
    with pytest.raises(RecipeError, match="t:1: holds a value that is not plain data"):
        store_rows([Row("d", ({"role": "user", "content": "q", "date": {1}},), "t:1")], Entry("rows", {"b": 1}))


def test_rows_are_read_and_encoded_once(tmp_path: Path, cache: Path, calls: list[int], monkeypatch: Any) -> None:
    data = write(tmp_path)
    first = check_data(data, tiny.tokenizer(), {2})
    assert calls
    calls.clear()
    monkeypatch.setattr(reading, "iterate", None)
    again = check_data(data, tiny.tokenizer(), {2})
    assert calls == [0], "only the few rows that are held out are encoded again"
    assert (again.train[:], again.findings) == (first.train[:], first.findings)


@pytest.mark.parametrize("change", ["content", "template", "tokenizer", "option", "stop", "vocabulary", "code", "day"])
def test_another_key_for_whatever_changes_the_tokens(
    tmp_path: Path, cache: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path)
    build.encode_rows(read_part(data, "train"), JOB)
    before = {file: file.read_bytes() for file in encoded_files(cache)}
    tokenizer, job = tiny.tokenizer(), JOB
    if change == "content":
        data = write(tmp_path, tiny.sums(ROWS, 1))
    elif change == "template":
        job = replace(JOB, tokenizer=tiny.tokenizer(tiny.CHATML + "{# newer #}"))
    elif change == "tokenizer":
        tokenizer.add_tokens(["plus"])
        job = replace(JOB, tokenizer=tokenizer)
    elif change == "option":
        job = replace(JOB, rules=Rules(64, learn="last_answer"))
    elif change == "stop":
        job = replace(JOB, stop=frozenset({2, 3}))
    elif change == "vocabulary":
        job = replace(JOB, vocabulary=499)
    elif change == "day":
        monkeypatch.setattr(build, "writes_day", lambda *_: True)
    else:
        monkeypatch.setattr(build, "code_digest", lambda: "newer")
    build.encode_rows(read_part(data, "train"), job)
    assert len(encoded_files(cache)) == 2
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "manifest", "other facts"])
@pytest.mark.parametrize("kind", ["rows", "encoded"])
def test_damaged_or_foreign_entry_is_made_anew(tmp_path: Path, cache: Path, kind: str, damage: str) -> None:
    data = write(tmp_path)
    expected = build.encode_rows(read_part(data, "train"), JOB).examples[:]
    (file,) = cache.glob(f"{kind}-*/rows.arrow")
    content, manifest = file.read_bytes(), file.with_name("manifest.json")
    sound = manifest.read_text()
    if damage == "manifest":
        manifest.write_text("[")
    elif damage == "other facts":
        manifest.write_text(json.dumps(json.loads(sound) | {"facts": {}}))
    else:
        changed = content[:-1] if damage == "cut" else content[:99] + b"?" + content[100:]
        file.write_bytes(b"foreign" if damage == "foreign" else changed)
    assert build.encode_rows(read_part(data, "train"), JOB).examples[:] == expected
    assert (file.read_bytes(), manifest.read_text()) == (content, sound)


@pytest.mark.parametrize("left", ["sound", "cut", "foreign"])
def test_stopped_encoding_goes_on_and_gives_the_same(
    tmp_path: Path, cache: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    data = write(tmp_path)
    rows = read_part(data, "train")

    def stop_after_two(table: Any, folder: Path, number: int) -> Path:
        if number == 2:
            (folder / "0000002.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        return write_part(table, folder, number)

    monkeypatch.setattr(build, "write_part", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        build.encode_rows(rows, JOB)
    monkeypatch.setattr(build, "write_part", write_part)
    assert encoded_files(cache) == []
    part = next(cache.glob(".encoded-*.parts/0000001-*"))
    if left == "cut":
        part.write_bytes(part.read_bytes()[:-8])
    elif left == "foreign":
        part.with_name(f"0000003-{'0' * 64}.arrow").write_bytes(b"foreign")
    calls.clear()
    build.encode_rows(rows, JOB)
    assert calls == ([5, 10, 15, 20] if left == "cut" else [10, 15, 20])
    (file,) = encoded_files(cache)
    resumed = file.read_bytes()
    shutil.rmtree(cache)
    build.encode_rows(read_part(data, "train"), JOB)
    assert file.read_bytes() == resumed
    assert not list(cache.glob(".*.parts"))


def test_one_of_several_encodes_and_the_others_wait(tmp_path: Path, cache: Path, calls: list[int]) -> None:
    rows = read_part(write(tmp_path), "train")
    results: list[list[Example]] = []
    threads = [
        threading.Thread(target=lambda: results.append(build.encode_rows(rows, JOB).examples[:])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 3
    assert calls == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("when", ["reading", "before encoding", "while encoding"])
def test_small_disk_is_one_line_and_leaves_nothing_that_counts(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    data = write(tmp_path)
    rows = read_part(data, "train") if when != "reading" else None

    def full(*arguments: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as small:
        if when == "while encoding":
            small.setattr(build, "write_part", full)
        else:
            small.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, entries.SPARE))
        with pytest.raises(MachineError) as caught:
            build.encode_rows(rows or read_part(data, "train"), JOB)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert re.fullmatch(rf"{cache}: .*; set LLMTUNE_CACHE to a folder on a larger disk", message)
    assert ("no room for" if when != "while encoding" else "No space left on device") in message
    assert encoded_files(cache) == []
    assert build.encode_rows(read_part(data, "train"), JOB).examples[:]


def test_cache_that_cannot_be_written_matters_for_many_rows_alone(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file")
    few = write(tmp_path, tiny.sums(3))
    assert len(build.encode_rows(read_part(few, "train"), JOB).examples) == 3
    with pytest.raises(LlmtuneError, match="cache"):
        read_part(write(tmp_path), "train")


def test_few_rows_are_read_though_the_cache_is_another_users(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_file, text_of = Path.is_file, Path.read_text

    def refuse(path: Path) -> Path:
        if path.is_relative_to(cache):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return path

    monkeypatch.setattr(Path, "is_file", lambda path: is_file(refuse(path)))
    monkeypatch.setattr(Path, "read_text", lambda path, *how, **named: text_of(refuse(path), *how, **named))
    few = write(tmp_path, tiny.sums(3))
    assert len(build.encode_rows(read_part(few, "train"), JOB).examples) == 3


def test_least_recently_used_entries_go_first(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "LIMIT", 250)
    names = ["rows-new", "rows-old", "rows-newest", ".rows-x.parts", ".rows-y.parts"]
    for age, name in ((20, names[0]), (30, names[1]), (0, names[2]), (8 * 86_400, names[3]), (60, names[4])):
        (cache / name).mkdir(parents=True)
        (cache / name / "rows.arrow").write_bytes(b"x" * 100)
        os.utime(cache / name, (time.time() - age,) * 2)
    make_room(cache, cache / "rows-newest")
    assert sorted(path.name for path in cache.iterdir()) == [".rows-y.parts", "rows-new", "rows-newest"]


def test_source_without_files_is_named_by_its_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row(f"r{n}", ({"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}), f"hub:{n}")
        for n in range(9)
    ]
    monkeypatch.setattr(reading, "iterate", lambda source, split, form: iter(rows))
    for _ in range(2):
        assert read_part(Data(train="owner/name"), "train")[:] == rows
        assert len(list(cache.glob("rows-*"))) == 1
    rows[0] = replace(rows[0], id="other")
    read_part(Data(train="owner/name"), "train")
    assert len(list(cache.glob("rows-*"))) == 2


def test_holds_out_the_rows_that_it_always_did() -> None:
    turns = [({"role": "user", "content": f"q {n % 70}"}, {"role": "assistant", "content": "a"}) for n in range(100)]
    rows = [Row(str(n), messages, f"t:{n}") for n, messages in enumerate(turns)]
    hashes = [hashlib.sha256(dedup_key(row).content.encode()).hexdigest() for row in rows]
    chosen = set(sorted(set(hashes))[: math.ceil(0.13 * 70)])
    stored = store_rows(rows, Entry("rows", {}))
    mask = hold_out(stored.contents, 0.13, stored.labels("source"))
    assert mask.tolist() == [digest in chosen for digest in hashes]
    assert mask.sum() > 10


def test_trainer_rows_are_the_examples_made_one_by_one(tmp_path: Path, cache: Path) -> None:
    stored = build.encode_rows(read_part(write(tmp_path), "train"), JOB).examples
    plain = [*stored, Example("all", "t:1", [5, 6, 2], [5, 6, 2]), Example("none", "t:2", [5, 2], [IGNORED] * 2)]
    for examples in (stored, plain):
        rows = ExampleRows(examples, 7)
        expected = [
            {"input_ids": np.array(example.input_ids), "labels": np.array(example.labels), "index": place}
            for place, example in enumerate(examples, 7)
        ]
        for row, other in zip(rows, expected, strict=True):
            np.testing.assert_equal(row, other)
            assert row["input_ids"].dtype == row["labels"].dtype == np.int64
        assert row_lengths(rows) == row_lengths(expected)
        assert row_targets(rows) == row_targets(expected)
    ids = TokenIds(stored, plain)
    assert ids[:] == [example.input_ids for example in [*stored, *plain]]
    assert ids.lengths == [len(one) for one in ids]


def test_learned_first_tokens_are_no_targets() -> None:
    examples = [
        Example("a", "t:1", [5, 6, 2], [5, 6, 2], is_text=True),
        Example("b", "t:2", [5, 6, 2], [IGNORED, 6, IGNORED]),
        Example("c", "t:3", [7, 2], [IGNORED] * 2),
        Example("d", "t:4", [7, 2], [7, IGNORED]),
    ]
    table = pa.Table.from_batches([to_batch_of(examples)])
    stored = EncodedRows(table)
    assert stored[:] == examples
    assert stored.targets.tolist() == row_targets(ExampleRows(examples)) == [2, 1, 0, 0]


def to_batch_of(examples: list[Example]) -> Any:
    """These examples as a batch of a table."""
    from llmtune.data.encoding.encode import Encoded
    from llmtune.data.store.encoded import to_batch

    return to_batch(Encoded(examples=examples), range(len(examples)))
