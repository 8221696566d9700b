"""docs/methods.md says of every method, adapter and architecture what filling its cell gives."""

import random
from pathlib import Path

import pytest

from tests.support import matrix
from tests.support.matrix import CELLS, GOOD, Cell

TOLD = matrix.parse(matrix.DOCUMENT.read_text(encoding="utf-8"))
REFUSED = [cell for cell, words in TOLD.items() if words != GOOD]


def sample() -> list[Cell]:
    """A dozen cells that have every architecture, adapter and method among them, and two refusals."""
    chosen = [cell for index, cell in enumerate(CELLS) if index % 31 == 3]
    return [*chosen[:10], *REFUSED[:: max(1, len(REFUSED) // 2)][:2]]


def test_the_table_has_every_cell_with_a_result_or_a_refusal() -> None:
    assert set(TOLD) == set(CELLS)
    assert all(words == GOOD or words.startswith("method.") for words in TOLD.values())


def test_the_tables_are_what_the_code_makes_of_the_results() -> None:
    text = matrix.DOCUMENT.read_text(encoding="utf-8")
    made = matrix.between(matrix.between(text, "matrix", matrix.table(TOLD)), "rates", matrix.default_rates())
    assert made == text


def test_the_sample_is_a_cross_section() -> None:
    cells = sample()
    assert len(cells) == 12
    assert {cell.kind for cell in cells} == set(matrix.KINDS)
    assert {cell.adapter for cell in cells} == set(matrix.ADAPTERS)
    assert {cell.method for cell in cells} == set(matrix.METHODS)
    assert {cell.tied for cell in cells} == {True, False}


@pytest.mark.parametrize("cell", sample(), ids=lambda cell: cell.name)
def test_a_cell_gives_what_the_table_says(tmp_path: Path, cell: Cell) -> None:
    assert matrix.fill(cell, tmp_path) == TOLD[cell]


@pytest.mark.slow
def test_another_process_loads_the_deltas_of_a_sample(tmp_path: Path) -> None:
    cells = random.Random(0).sample([cell for cell in CELLS if TOLD[cell] == GOOD], 12)
    assert matrix.results(cells, tmp_path) == {cell: GOOD for cell in cells}


@pytest.mark.slow
def test_every_cell_gives_what_the_table_says() -> None:
    assert matrix.everything() == TOLD
