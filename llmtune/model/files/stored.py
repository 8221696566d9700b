"""What a base's safetensors files hold, by their headers: names, shapes and dtypes; no weight is read."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from llmtune.errors import FieldError
from llmtune.model.reading import error_words, reading

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""The most that a file of weights has when llmtune writes it, unless one tensor is larger."""
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    shape: list[int]
    dtype: str
    """As safetensors writes it: F32, BF16, U8, ..."""


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files that transformers loads weights from, whether they are there or not.

    Raises FieldError where the folder has no safetensors weights, or an index that is none.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise FieldError("model.base", f"{name} holds neither {SINGLE} nor {INDEX}; {_conversion(folder, name)}")
    refuse_damaged(folder / INDEX, name)
    with reading(name, INDEX):
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if not shards or not all(isinstance(shard, str) and shard == Path(shard).name for shard in shards):
            raise ValueError("its weight_map names no files beside it")
    return [folder / shard for shard in sorted(shards)]


def holds_weights(folder: Path, name: str) -> bool:
    """Whether all the files that transformers loads weights from are there."""
    named = any((folder / file).is_file() for file in (SINGLE, INDEX))
    return named and all(file.is_file() for file in weight_files(folder, name))


def _conversion(folder: Path, name: str) -> str:
    """How pickled weights become safetensors, by a command that the user runs: reading pickles can run code."""
    source = name.removeprefix("the folder ")
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"a, b = {source!r}, {f'{Path(source).name}-safetensors'!r}; "
        "M.from_pretrained(a, dtype='auto').save_pretrained(b); T.from_pretrained(a).save_pretrained(b)"
    )
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*")) or source != str(folder)
    return (
        f"pickled weights are refused; convert them with: python -c {shlex.quote(code)}"
        if pickled
        else "it has no weights"
    )


def stored_tensors(folder: Path, name: str) -> dict[str, StoredTensor]:
    """Every tensor of a base by name; raises FieldError where a file is missing, damaged or a pointer."""
    tensors: dict[str, StoredTensor] = {}
    files = weight_files(folder, name)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        named = f"{missing[0]}, which its index names" if (folder / INDEX).is_file() else missing[0]
        others = f" ({len(missing)} of {len(files)} files are missing)" if missing[1:] else ""
        raise FieldError("model.base", f"{name} lacks {named}{others}; download it again")
    for file in files:
        for key, tensor in _tensors(file, name):
            if key in tensors:
                raise FieldError("model.base", f"{name}: {tensors[key].file.name} and {file.name} both store {key}")
            tensors[key] = tensor
    return tensors


def _tensors(file: Path, name: str) -> Iterator[tuple[str, StoredTensor]]:
    refuse_damaged(file, name)
    try:
        with safe_open(file, framework="pt") as stored:
            parts = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118
            tensors = {key: StoredTensor(file, list(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
    except Exception as error:
        message = f"{name}: {file.name} is damaged or incomplete ({error_words(error)}); download it again"
        raise FieldError("model.base", message) from error
    yield from tensors.items()


def refuse_damaged(file: Path, name: str) -> None:
    """Raise FieldError for a Git LFS pointer, an empty file, a folder or a broken link in place of a base's file."""
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "a broken link" if file.is_symlink() else "missing"
        raise FieldError("model.base", f"{name}: {file.name} is {kind}; download it again")
    with reading(name, file.name), file.open("rb") as content:
        start = content.read(len(_POINTER))
    if not start:
        raise FieldError("model.base", f"{name}: {file.name} is empty; download it again")
    if start == _POINTER:
        message = f"{name}: {file.name} is a Git LFS pointer, not the file itself; run `git lfs pull` there"
        raise FieldError("model.base", message)
