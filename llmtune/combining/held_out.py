"""Held-out rows of one run that another run was trained on."""

import numpy as np

from llmtune.combining.parts import Part
from llmtune.data.gate import split_rows
from llmtune.data.overlap import find_overlap
from llmtune.data.store.rows import StoredRows
from llmtune.errors import LlmtuneError


def count_trained(parts: list[Part]) -> dict[str, object]:
    """How many rows the first run holds out, and how many of them each other run trained on, by its name.

    A run whose rows cannot be read any more is left out; empty where the first one's cannot.
    """
    held_out = _rows(parts[0], held_out=True)
    if held_out is None:
        return {}
    others = ((part.name, _rows(part, held_out=False)) for part in parts[1:])
    trained = {name: len(find_overlap(held_out, rows)[0]) for name, rows in others if rows is not None}
    return {"rows": len(np.asarray(held_out.contents)), "trained": trained}


def _rows(part: Part, held_out: bool) -> StoredRows | None:
    try:
        train, rest = split_rows(part.settings.data, part.settings.train.seed)
    except LlmtuneError:
        return None
    return rest if held_out else train
