"""Comparisons and rates of tests stay in their folders."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that this test's comparisons are kept in."""
    file = tmp_path / "data" / "comparisons.jsonl"
    monkeypatch.setenv("LLMTUNE_COMPARISONS", str(file))
    return file
