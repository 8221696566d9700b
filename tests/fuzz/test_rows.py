"""Any data file is learned as it stands, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from llmtune import terminal
from llmtune.data.gate import Gate, check_data
from llmtune.data.row import Row
from llmtune.data.rows import read
from llmtune.model.base import Base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.recipe.sections import Data
from tests.fuzz.file_cases import CASES, DataFile
from tests.fuzz.odd_files import ALL, make
from tests.fuzz.outcome import BrokenRuleError, Tally
from tests.fuzz.plain_reader import read_turns
from tests.support import tiny

GOOD = DataFile("jsonl", b'{"prompt": "a?", "completion": "b"}\n{"prompt": "c?", "completion": "d"}\n')


class Reader:
    """Reads data files as `llmtune check` does, for a tiny base."""

    def __init__(self, folder: Path) -> None:
        base = Base(tiny.save_base(folder / "base"), "base", None, None)
        self.folder, self.tokenizer, self.stop = folder, load_tokenizer(base), stop_ids(base)

    def check(self, file: DataFile) -> None:
        """Read a file, encode its rows and print what was found; raises where a row's text is not what is learned."""
        path = self.folder / f"rows.{file.ending}"
        path.write_bytes(file.content)
        compare_with_plain_reader(self.learn(str(path)), file)

    def learn(self, source: str) -> list[Row]:
        """The rows of a source, which are learned as they stand; raises where they are not."""
        gate = check_data(Data(train=source), self.tokenizer, self.stop)
        terminal.findings(gate.findings)
        json.dumps(gate.findings, ensure_ascii=False).encode()
        rows = read(source)
        self._compare_with_learned(rows, gate)
        return rows

    def _compare_with_learned(self, rows: list[Row], gate: Gate) -> None:
        """Raise where an example's learned tokens are not its row's answers, each with its stop token, or its text."""
        by_place = {row.where: row for row in rows}
        for example in [*gate.train, *gate.eval]:
            row = by_place[example.where]
            answers = [turn["content"] for turn in row.messages if turn["role"] == "assistant"]
            wanted = "".join(f"{answer}<|im_end|>" for answer in answers)
            learned = self.tokenizer.decode([label for label in example.labels if label != -100])
            if row.text is not None:  # documents are joined, and cut at max_length
                wanted, learned = row.text[:8], learned[: len(row.text[:8])]
            if learned != wanted:
                raise BrokenRuleError(f"{example.where}: teaches {learned[:100]!r}, not {wanted[:100]!r}")


def compare_with_plain_reader(rows: list[Row], file: DataFile) -> None:
    """Raise where the rows of an accepted file are not what another reader finds in it."""
    try:
        wanted = read_turns(file)
    except Exception as error:
        raise BrokenRuleError(f"accepted what a plain reader refuses: {type(error).__name__} {error}") from error
    got = [[(turn["role"], turn["content"]) for turn in row.messages] for row in rows]
    if wanted is not None and got != wanted:
        raise BrokenRuleError(f"{len(got)} rows are read, and they are not the {len(wanted)} rows of the file")


@pytest.mark.slow
def test_learns_the_text_of_every_row_or_refuses_the_file_in_one_line(tmp_path: Path, record_property: Any) -> None:
    reader = Reader(tmp_path)
    reader.check(GOOD)
    tally = Tally()

    @settings(settings.get_profile("fuzz"))
    @given(CASES)
    def holds(file: DataFile) -> None:
        tally.judge(lambda: reader.check(file))

    holds()
    record_property("fuzz", str(tally))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader that has loaded every library."""
    reader = Reader(tmp_path_factory.mktemp("reader"))
    reader.check(GOOD)
    return reader


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ALL)), ids=lambda number: ascii(ALL[number])[1:30])
def test_learns_an_odd_source_or_refuses_it_in_one_line(
    reader: Reader, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path, ALL[number])
    tally = Tally()
    tally.judge(lambda: print(len(reader.learn(source))))
    assert tally.outcomes["accepted"] + tally.outcomes["refused"] == 1


@pytest.mark.parametrize("change", [b'"prompt": "a", "prompt"', b'"completion": "a", "prompt"'])
def test_plain_reader_sees_a_key_that_hides_another(change: bytes) -> None:
    with pytest.raises(KeyError):
        read_turns(DataFile("jsonl", GOOD.content.replace(b'"prompt"', change)))
