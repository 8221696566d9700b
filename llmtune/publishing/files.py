"""What goes to the Hub of a run, by name: weights, exported files, recipe and scores; nothing that is not on a list."""

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmtune.errors import PublishError
from llmtune.files import fingerprint, read_json
from llmtune.model.base import Base
from llmtune.model.files.fingerprints import COPIED, TOKENIZER
from llmtune.publishing.card import without_paths
from llmtune.publishing.hub import Content
from llmtune.publishing.parts.gguf import MODELFILE, gguf_facts, modelfile_place, public_modelfile
from llmtune.publishing.parts.pictures import pictures
from llmtune.recipe.paths import strip_paths
from llmtune.recipe.sections import Publish, Recipe, dump
from llmtune.run import Run

ALLOWED = {
    "delta": ("adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "base.json", *TOKENIZER),
    "merged": ("config.json", "model*.safetensors", "model.safetensors.index.json", *COPIED),
}
"""The files of a folder that may be published; no other one is."""

_CONFIGS = {"adapter_config.json", "base.json", "config.json", "generation_config.json", "tokenizer_config.json"}


def weights(run: Run, publish: Publish, base: Base) -> dict[str, Content]:
    """Return the allowed files of delta/ or merged/, as the step left them, but configs without private paths."""
    kind = publish.weights or "delta"
    step, folder = ("merge", run.merged) if kind == "merged" else ("train", run.delta)
    names = [(run.path / file).relative_to(folder).as_posix() for file in run.verify(step, PublishError)]
    allowed = [name for name in names if any(fnmatch(name, pattern) for pattern in ALLOWED[kind])]
    files: dict[str, Content] = {name: folder / name for name in allowed}
    for name in _CONFIGS & set(files):
        stored, clean = folder / name, _clean(name, read_json(folder / name), base)
        files[name] = stored.read_bytes() if clean == read_json(stored) else _json(clean)
    return files


def exported(run: Run) -> dict[str, Content]:
    """Return the .gguf files that were exported and Ollama's Modelfile, by their names.

    Raises PublishError for one that changed since.
    """
    facts = run.manifest()["steps"].get("export", {}).get("files", {})
    modelfile = modelfile_place(run)
    for place in [*gguf_facts(run), *([modelfile] if modelfile else [])]:
        file = run.path / place
        if not file.is_file() or fingerprint(file) != facts[place]:
            again = f"run it again: llmtune export {shlex.quote(str(run.path))} --to {file.parent.name}"
            raise PublishError(f"{file}: was changed or removed after `llmtune export`; {again}")
    files: dict[str, Content] = {Path(place).name: run.path / place for place in gguf_facts(run)}
    return {**files, MODELFILE: public_modelfile(run)[0].encode()} if modelfile else files


def _clean(name: str, config: dict[str, Any], base: Base) -> dict[str, Any]:
    """Return a config that names its base as the Hub does, and no folder of this machine."""
    if name == "adapter_config.json":
        commit = (
            base.revision if base.name == base.hub_id and re.fullmatch(r"[0-9a-f]{40}", base.revision or "") else None
        )
        name_or_path = None if base.converted else base.hub_id
        return {**config, "base_model_name_or_path": name_or_path, "revision": commit}
    if name == "base.json":
        # Converted weights are at no revision of a model on the Hub; `converted` says what they are.
        nowhere = {"revision": None, "hub_id": None} if base.converted else {}
        return {**dict(strip_paths(config)), **nowhere}
    return {
        key: value for key, value in config.items() if not key.endswith("name_or_path") or strip_paths(value) == value
    }


def records(run: Run, settings: Recipe) -> dict[str, Content]:
    """Return the recipe without paths, the card's pictures, and the scores of the evaluation without the rows."""
    files: dict[str, Content] = {"recipe.yaml": dump(without_paths(settings)).encode()}
    files |= {picture.file: picture.svg.encode() for picture in pictures(run)}
    if run.done("eval"):
        stored = [run.eval / name for name in ("base.json", "tuned.json") if (run.eval / name).is_file()]
        files |= {f"eval/{file.name}": _json(scores_only(read_json(file))) for file in stored}
    return files


def scores_only(value: object) -> object:
    """Return an evaluation without its rows: of mappings the numbers and the names, of lists nothing."""
    if not isinstance(value, dict):
        return value
    kept = {
        key: scores_only(item)
        for key, item in value.items()
        if isinstance(item, dict | int | float | None) or _is_name(item)
    }
    return {key: item for key, item in kept.items() if item != {}}


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.:/-]{1,80}", value) is not None and strip_paths(value) == value


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
