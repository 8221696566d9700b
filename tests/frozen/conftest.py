"""A cache folder for each test."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cached outputs for this test alone."""
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "frozen-blocks"
