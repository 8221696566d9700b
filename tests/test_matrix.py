"""docs/methods.md says of every method, adapter and architecture what filling its cell gives."""

from itertools import product
from pathlib import Path

import pytest

from tests.support import matrix
from tests.support.matrix import CELLS, GOOD, Cell

OUTCOMES = matrix.parse(matrix.DOCUMENT.read_text(encoding="utf-8"))
REFUSED = [cell for cell, words in OUTCOMES.items() if words != GOOD]


def sample() -> list[Cell]:
    """A dozen cells that have every adapter and method among them, and two refusals."""
    chosen = matrix.spread()[0::19][:10]
    return [*chosen, *REFUSED[:: max(1, len(REFUSED) // 2)][:2]]


def test_table_has_an_outcome_for_every_cell() -> None:
    assert set(OUTCOMES) == set(CELLS)
    assert all(words == GOOD or words.startswith("method.") for words in OUTCOMES.values())


def test_every_type_trains_with_lora_and_without_an_adapter_under_every_method() -> None:
    assert {words for cell, words in OUTCOMES.items() if cell.adapter in ("none", "lora", "vera")} == {GOOD}


def test_tables_match_what_the_code_writes() -> None:
    text = matrix.DOCUMENT.read_text(encoding="utf-8")
    rewritten = matrix.between(matrix.between(text, "matrix", matrix.table(OUTCOMES)), "rates", matrix.default_rates())
    assert rewritten == text


def test_sample_covers_every_adapter_and_method() -> None:
    cells = sample()
    assert len(cells) == 12
    assert {cell.adapter for cell in cells} == set(matrix.ADAPTERS)
    assert {cell.method for cell in cells} == set(matrix.METHODS)
    assert {cell.tied for cell in cells} == {True, False}


def test_cells_that_are_filled_again_have_every_pair() -> None:
    cells = matrix.spread()
    assert len(set(cells)) == len(cells) == len(matrix.KINDS) * len(matrix.ADAPTERS)
    for one, other in (("adapter", "method"), ("kind", "adapter"), ("kind", "method"), ("tied", "adapter")):
        pairs = {(getattr(cell, one), getattr(cell, other)) for cell in cells}
        assert pairs == set(product({pair[0] for pair in pairs}, {pair[1] for pair in pairs}))
    assert {(cell.kind, cell.tied) for cell in cells} == set(matrix.ROWS)


@pytest.mark.parametrize("cell", sample(), ids=lambda cell: cell.name)
def test_cell_matches_the_table(tmp_path: Path, cell: Cell) -> None:
    assert matrix.fill(cell, tmp_path) == OUTCOMES[cell]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_every_type_adapter_and_method_match_the_table(tmp_path: Path, number: int) -> None:
    cells = matrix.half(matrix.spread(), number)
    assert matrix.results(cells, tmp_path) == {cell: OUTCOMES[cell] for cell in cells}
