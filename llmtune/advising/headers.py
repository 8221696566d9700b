"""How many parameters a base has, by the headers of its files: no weight is read, and no torch imported."""

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmtune.errors import LlmtuneError
from llmtune.model.files.converted import count_parameters, find_gguf


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
    except (LlmtuneError, SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _cached(hub_id: str) -> Path | None:
    """The folder of a model that the Hub's cache holds."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(hub_id, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def _count(file: Path) -> int:
    """The numbers in all tensors of a file; raises SafetensorError for a damaged header."""
    with safe_open(file, framework="np") as stored:
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
