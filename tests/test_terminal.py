"""What commands print on terminals that lack some characters."""

import io
import sys

import pytest
from rich.console import Console

from llmtune import terminal
from llmtune.launch.streams import show_any_text
from llmtune.terminal import with_shown_marks


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii", "cp437", "no-such-encoding"])
def test_marks_are_brackets_where_the_encoding_has_no_others(encoding: str) -> None:
    assert with_shown_marks("a \u27e6b\u27e7", encoding) == "a [[b]]"
    assert with_shown_marks("a \u27e6b\u27e7", "utf-8") == "a \u27e6b\u27e7"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_prints_findings_on_any_terminal(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written = [io.BytesIO(), io.BytesIO()]
    streams = [io.TextIOWrapper(stream, encoding=encoding) for stream in written]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    show_any_text()
    monkeypatch.setattr(terminal, "console", Console(highlight=False, soft_wrap=True))
    terminal.findings({"notes": ["rows in \u65e5\u672c\u8a9e"], "example": "\u27e6\u00fc \u0924\u27e7"})
    print("\u65e5", file=sys.stderr)
    for stream in streams:
        stream.flush()
    out, err = (stream.getvalue().decode(encoding) for stream in written)
    assert "one row; the model learns the text between [[ and ]]" in out
    assert "rows in ???" in out
    assert err == "\\u65e5\n"


def test_tables_in_a_pipe_are_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=stream, highlight=False, soft_wrap=True))
    row = {"tuned against": "base, zero-shot", "metric": "loss (lower is better)", "verdict": "no difference measured"}
    terminal._table([row | {"difference": "-0.341 ± 0.179", "n": "120"}], set())
    assert len(stream.getvalue().splitlines()) == 2
