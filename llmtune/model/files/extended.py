"""A base with new tokens: a folder in the cache with a longer tokenizer and longer embeddings, else links."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llmtune.errors import FieldError
from llmtune.files import cache_folder, digest_of, remove_leftovers, write_folder, write_json
from llmtune.model.base import Base, build_skeleton, load_config, vocabulary
from llmtune.model.blocks import text_model
from llmtune.model.files.fingerprints import COPIED, leads_outside, named_like, stamp
from llmtune.model.files.room import hold_until_end, lock_of, make_room
from llmtune.model.files.stored import INDEX, holds_weights, stored_tensors
from llmtune.model.reading import reading
from llmtune.working import working

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

KEY = "model.add_tokens"
RECORD = "added.json"
LIMIT = 20 * 2**30
"""Bytes that bases with new tokens may take in the cache."""


def extend(base: Base, tokens: Sequence[str]) -> Base:
    """The base with new tokens, written on first use; each starts as the mean of what it was read as before.

    The files of a base that were changed since are another base. Raises FieldError for a token that cannot be new.
    """
    from transformers import AutoTokenizer

    with reading(base.name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    _check(tokenizer, tokens)
    stamps = {file.name: stamp(file) for file in sorted(base.folder.iterdir()) if file.is_file()}
    digest = digest_of([str(base.folder.resolve()), stamps, list(tokens)])[:16]
    folder, locks = cache_folder() / "extended" / digest, cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with lock_of(folder, locks):
        remove_leftovers(folder)
        is_new = not (folder / RECORD).is_file()
        if is_new:
            with working(f"adding {len(tokens)} tokens to {base.name}"), write_folder(folder, replace=False) as partial:
                _write(base, tokenizer, tokens, partial)
        hold_until_end(folder)
    if is_new:
        make_room(folder.parent, locks, LIMIT)
    ids = tuple(json.loads((folder / RECORD).read_text())["ids"])
    return replace(base, folder=folder, added=ids)


def _check(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> None:
    """Raise FieldError for a token that is empty, there already, or named twice."""
    known = tokenizer.get_vocab()
    for index, token in enumerate(tokens):
        if not token.strip():
            raise FieldError(f"{KEY}.{index}", "is empty; write the token's text")
        if token in known:
            raise FieldError(f"{KEY}.{index}", f"{token!r} is a token of this base already; leave it out")
        if token in tokens[:index]:
            raise FieldError(f"{KEY}.{index}", f"{token!r} is named twice")


def _write(base: Base, tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str], folder: Path) -> None:
    from transformers import AddedToken

    config = load_config(base)
    rows = vocabulary(config)
    pieces = [list(tokenizer(token, add_special_tokens=False)["input_ids"]) for token in tokens]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    needed = max(rows, max(ids) + 1)
    if needed > rows:
        _refuse_other_tables(base, rows)
    _copy_small_files(base, folder)
    _write_tokenizer(tokenizer, folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", _with_rows(settings, config, needed))
    if holds_weights(base.folder, base.name):
        _write_weights(base, folder, rows, needed, dict(zip(ids, pieces, strict=True)))
    write_json(folder / RECORD, {"tokens": list(tokens), "ids": ids, "rows": needed})


def _copy_small_files(base: Base, folder: Path) -> None:
    """Copy what a base is made of beside its weights; raises FieldError for a link to a file elsewhere."""
    names = ("config.json", INDEX, "README.md", *COPIED)  # a model card names the license
    for file in (file for file in named_like(base.folder, names) if file.is_file()):
        if leads_outside(file, base.folder):
            message = f"{base.name}: {file.name} is a link to a file outside the base's folder"
            raise FieldError("model.base", f"{message}; replace it by the file itself")
        target = folder / file.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _write_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    template = {file.name: file.read_bytes() for file in folder.glob("chat_template.*")}
    tokenizer.save_pretrained(folder)
    for name, content in template.items():  # as the base has it, to the byte
        (folder / name).write_bytes(content)


def _with_rows(settings: dict[str, Any], config: "PreTrainedConfig", needed: int) -> dict[str, Any]:
    """What a config.json holds for longer embeddings, in its text model too, and where it left their length open."""
    longer = _renumbered(settings, vocabulary(config), needed)
    text = config.get_text_config()
    key = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    (longer if key is None else longer.setdefault(key, {})).setdefault("vocab_size", needed)
    return longer


def _renumbered(settings: dict[str, Any], rows: int, needed: int) -> dict[str, Any]:
    return {
        key: needed
        if key == "vocab_size" and value == rows
        else _renumbered(value, rows, needed)
        if isinstance(value, dict)
        else value
        for key, value in settings.items()
    }


def _refuse_other_tables(base: Base, rows: int) -> None:
    """Raise FieldError for a model that reads tokens from more tables than its embeddings, which no adapter trains."""
    skeleton = build_skeleton(base)
    words = skeleton.get_input_embeddings()
    tables = (each for each in text_model(skeleton).named_modules() if isinstance(each[1], nn.Embedding))
    other = next((name for name, table in tables if table is not words and table.num_embeddings == rows), None)
    if other:
        message = f"{base.name} has a second table of tokens ({other}), so it cannot get more of them"
        raise FieldError(KEY, f"{message}; write a token that it has and does not use in your rows")


def _write_weights(base: Base, folder: Path, rows: int, needed: int, pieces: dict[int, list[int]]) -> None:
    """Link the base's weights, but write anew the files with a matrix that has a row for each token."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = stored_tensors(base.folder, base.name)
    ends = _matrix_names(base)
    matrices = {name for name, one in tensors.items() if name.endswith(ends) and one.shape[:1] == [rows]}
    if not matrices:
        raise FieldError(KEY, f"{base.name} stores its embeddings in a way of its own, so they cannot grow")
    longer = {tensors[name].file for name in matrices}
    for file in {one.file for one in tensors.values()}:
        if file not in longer:
            os.symlink(file.resolve(), folder / file.name)
            continue
        with safe_open(file, framework="pt") as stored:
            values = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata()
        for name in matrices & set(values):
            values[name] = _longer(values[name], needed, pieces)
        save_file(values, folder / file.name, metadata)


def _matrix_names(base: Base) -> tuple[str, ...]:
    """How the names of the weights end that have a row for each token: the embeddings, and the head."""
    skeleton = build_skeleton(base)
    words, head = skeleton.get_input_embeddings().weight, getattr(skeleton.get_output_embeddings(), "weight", None)
    named = skeleton.named_parameters(remove_duplicate=False)
    return tuple(".".join(name.split(".")[-2:]) for name, parameter in named if parameter is words or parameter is head)


def _longer(matrix: "torch.Tensor", needed: int, pieces: dict[int, list[int]]) -> "torch.Tensor":
    """A matrix (V, H) with `needed` rows, in which each new token has the mean of its pieces' rows."""
    import torch

    result = torch.cat([matrix, matrix.new_zeros(max(0, needed - len(matrix)), matrix.shape[1])])
    for token, parts in pieces.items():
        result[token] = (matrix[parts] if parts else matrix).float().mean(0).to(matrix.dtype)
    return result
