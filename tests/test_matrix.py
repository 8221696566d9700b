"""docs/methods.md says of every method, adapter and architecture what filling its cell gives."""

import random
from pathlib import Path

import pytest

from tests.support import matrix
from tests.support.matrix import CELLS, GOOD, Cell

OUTCOMES = matrix.parse(matrix.DOCUMENT.read_text(encoding="utf-8"))
REFUSED = [cell for cell, words in OUTCOMES.items() if words != GOOD]


def sample() -> list[Cell]:
    """A dozen cells that have every architecture, adapter and method among them, and two refusals."""
    chosen = [cell for index, cell in enumerate(CELLS) if index % 41 == 3]
    return [*chosen[:10], *REFUSED[:: max(1, len(REFUSED) // 2)][:2]]


def test_table_has_an_outcome_for_every_cell() -> None:
    assert set(OUTCOMES) == set(CELLS)
    assert all(words == GOOD or words.startswith("method.") for words in OUTCOMES.values())


def test_tables_match_what_the_code_writes() -> None:
    text = matrix.DOCUMENT.read_text(encoding="utf-8")
    rewritten = matrix.between(matrix.between(text, "matrix", matrix.table(OUTCOMES)), "rates", matrix.default_rates())
    assert rewritten == text


def test_sample_covers_every_model_adapter_and_method() -> None:
    cells = sample()
    assert len(cells) == 12
    assert {cell.kind for cell in cells} == set(matrix.KINDS)
    assert {cell.adapter for cell in cells} == set(matrix.ADAPTERS)
    assert {cell.method for cell in cells} == set(matrix.METHODS)
    assert {cell.tied for cell in cells} == {True, False}


@pytest.mark.parametrize("cell", sample(), ids=lambda cell: cell.name)
def test_cell_matches_the_table(tmp_path: Path, cell: Cell) -> None:
    assert matrix.fill(cell, tmp_path) == OUTCOMES[cell]


@pytest.mark.slow
def test_fresh_process_loads_the_deltas_of_a_sample(tmp_path: Path) -> None:
    cells = random.Random(0).sample([cell for cell in CELLS if OUTCOMES[cell] == GOOD], 12)
    assert matrix.results(cells, tmp_path) == {cell: GOOD for cell in cells}


@pytest.mark.slow
def test_every_cell_matches_the_table() -> None:
    assert matrix.everything() == OUTCOMES
