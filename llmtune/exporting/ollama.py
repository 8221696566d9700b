"""Not there yet."""

from pathlib import Path
from typing import Any

from llmtune.errors import MachineError
from llmtune.exporting.forms import Export


def check(export: Export) -> None:
    """Refuse the form."""
    raise MachineError("this form of export is not there yet")


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write nothing."""
    return {}


def prove(export: Export, folder: Path) -> dict[str, Any]:
    """Prove nothing."""
    return {}


def summary(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Tell nothing."""
    return []
