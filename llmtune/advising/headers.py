"""How many parameters a base has, by the headers of its files: no weight is read, and no torch imported."""

import json
import math
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.model.files.converted import count_parameters, find_gguf

_LONGEST = 1 << 27
"""Bytes of a header of safetensors, which its format bounds by less."""


def parameters_of(name: str) -> int | None:
    """The parameters of a base by its name, where its files are on this machine; None where they do not tell."""
    try:
        if name.startswith("package:"):
            return count_parameters(find_gguf(name.removeprefix("package:")), name)
        path = Path(name).expanduser()
        if path.is_file():
            return count_parameters(path, name) if path.suffix == ".gguf" else None
        folder = path if path.is_dir() else _cached(name)
        files = sorted(folder.glob("*.safetensors")) if folder else []
        return sum(map(_count, files)) or None
    except (LlmtuneError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _cached(hub_id: str) -> Path | None:
    """The folder of a model that the Hub's cache holds."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(hub_id, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def _count(file: Path) -> int:
    """The numbers in all tensors of a file; raises ValueError for a damaged header."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        if size > _LONGEST:
            raise ValueError(f"{file.name} is no file of safetensors")
        header = json.loads(content.read(size))
    return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")
