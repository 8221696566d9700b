"""How many operations a second matrix products reach on this machine's CPU, measured once a day and kept."""

import contextlib
import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import LlmtuneError
from llmtune.estimate.cards import CARDS
from llmtune.files import cache_folder, write_json
from llmtune.model.blocks import blocks
from llmtune.model.layout import Layout

SECONDS = 0.25
"""For how long products are measured."""
PRODUCTS = 200
"""How many are measured at the most: enough for small ones."""
TOKENS = 512
"""Rows of the measured products."""
_MOST = 2**26
"""Numbers of the largest matrix that is measured: a larger one runs at the same rate."""


def cpu_rate(layout: Layout, dtype: torch.dtype, fresh: bool = True) -> float:
    """Operations a second of products of a model's own shape on this CPU, as many threads as torch uses.

    The best rate of a machine is kept in the cache folder: one that other programs slow down says little. Without
    `fresh`, one of an earlier day is good enough.
    """
    shape = _shape(layout)
    key = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}, {shape}"
    file = cache_folder() / "rates.json"
    known = _read(file)
    entry = known.get(key, {})
    today = date.today().isoformat()
    if entry.get("date") == today or (entry and not fresh):
        return float(entry["rate"])
    rate = max(_measure(shape, dtype), float(entry.get("rate", 0.0)))
    with contextlib.suppress(OSError, LlmtuneError):  # a disk that cannot be written costs another measurement
        write_json(file, {**known, key: {"rate": rate, "date": today}})
    return rate


def card_rate(device: torch.device) -> float | None:
    """The rate that the maker of this machine's card states; None for a card that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "").replace("geforce", "")
    card = next((card for word, card in CARDS.items() if word.partition("-")[0] in name), None)
    return card.rate if card else None


def _measure(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Operations a second of the quickest product of (TOKENS, in) and (in, out)."""
    wide, narrow = shape
    own = torch.Generator()  # a training may be seeded already
    left, right = (torch.randn(shape, generator=own).to(dtype) for shape in ((TOKENS, narrow), (narrow, wide)))
    best = float("inf")
    with torch.inference_mode():
        torch.mm(left, right)
        end = time.perf_counter() + SECONDS
        for _ in range(PRODUCTS):
            began = time.perf_counter()
            if began > end:
                break
            torch.mm(left, right)
            best = min(best, time.perf_counter() - began)
    return 2 * TOKENS * wide * narrow / best


def _shape(layout: Layout) -> tuple[int, int]:
    """The shape of the largest matrix of a block."""
    first = blocks(layout.skeleton)[0]
    matrices = [tuple(one.shape[-2:]) for one in first.parameters() if one.ndim > 1 and one[..., 0].numel() > 1]
    wide, narrow = max(matrices, key=lambda shape: shape[0] * shape[1])
    return min(wide, _MOST // min(narrow, _MOST)), narrow


def _processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name, and how many of it this process may use."""
    with contextlib.suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x {os.cpu_count()}"
    return f"CPU x {os.cpu_count()}"


def _read(file: Path) -> dict[str, Any]:
    """What is kept; nothing where the file is damaged or of another shape."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(known, dict) and all(_is_entry(entry) for entry in known.values()):
            return known
    return {}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("rate"), int | float) and entry["rate"] > 0
