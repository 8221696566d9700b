"""publish(run): uploads card, weights, recipe and scores to the Hub; private unless the recipe says public."""

import json
import re
import shlex
import time
from fnmatch import fnmatch
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from huggingface_hub import ModelInfo, get_token

from llmtune.errors import FieldError, LlmtuneError, PublishError
from llmtune.files import home_folder, read_json, write_folder
from llmtune.model.base import Base
from llmtune.model.check import has_weights
from llmtune.model.files.fingerprints import COPIED, TOKENIZER, refuse_other_base
from llmtune.model.files.locate import locate_base
from llmtune.numbers import size
from llmtune.publishing import hub as hub_module
from llmtune.publishing.card import card, without_paths
from llmtune.publishing.header import publish_section
from llmtune.publishing.hub import Content, Sleep
from llmtune.publishing.license import read_license
from llmtune.recipe.paths import strip_paths
from llmtune.recipe.sections import Publish, Recipe, dump
from llmtune.run import Run, locates_mistakes

PREVIEW = "publish"
"""The folder of a run for what a dry run shows."""

ALLOWED = {
    "delta": ("adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "base.json", *TOKENIZER),
    "merged": ("config.json", "model*.safetensors", "model.safetensors.index.json", *COPIED),
}
"""The files of a folder that may be published; no other one is."""

SECRETS = {
    "a Hub token": r"\bhf_[A-Za-z0-9]{16,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_PRIVATE_PATH = re.compile(r"(?<![\w./:-])(~/|/(home|Users|root|tmp|var|mnt|media|Volumes|private)/|[A-Za-z]:\\)")
_CONFIGS = {"adapter_config.json", "base.json", "config.json", "generation_config.json", "tokenizer_config.json"}


@locates_mistakes
def preflight(settings: Recipe, sleep: Sleep = time.sleep) -> None:
    """Raise PublishError, MachineError or RecipeError before training if the result could not be published."""
    if settings.publish is None:
        return
    publish = publish_section(settings)
    if publish.weights == "merged" and not settings.merge.enabled:
        raise FieldError("publish.weights", "merged needs merge.enabled: true; set that, or try delta")
    target = hub_module.target(publish, sleep)
    target.check_login()
    base = locate_base(settings.model, weights=False)
    _check_base(publish, base)
    read_license(publish, base, target.base_info(base))
    target.probe()


def publish(run: Run, sleep: Sleep = time.sleep) -> dict[str, Any]:
    """Upload what the recipe says and return where it is; raises PublishError with the command that tries again."""
    try:
        facts = _publish(run, run.recipe(), sleep)
    except LlmtuneError as error:
        again = f"llmtune publish {shlex.quote(str(run.path))}"
        raise type(error)(f"{error}. The trained weights are untouched; try again with: {again}") from error
    print(f"published: {facts['url']} ({facts['visibility']}), {len(facts['uploaded'])} files")
    return facts


@locates_mistakes
def preview(run: Run) -> dict[str, Any]:
    """Write what `publish` would upload, but the weights, into the run's publish/ and ask nothing of the Hub.

    Gives the sizes in bytes of all files that would go, by name; raises PublishError as `publish` does.
    """
    settings = run.recipe()
    section, base = _published_base(run, settings)
    files = _files(run, settings, section, base, None)
    preview_folder = run.path / PREVIEW
    with write_folder(preview_folder) as folder:
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
    sizes = {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in sorted(files.items())}
    for name, count in sizes.items():
        print(f"{size(count):>8}  {name}")
    print(
        f"would go to {section.repo} ({section.visibility}); nothing was sent; the card: {preview_folder / 'README.md'}"
    )
    return {"repo": section.repo, "visibility": section.visibility, "bytes": sizes}


@locates_mistakes
def _publish(run: Run, settings: Recipe, sleep: Sleep) -> dict[str, Any]:
    section, base = _published_base(run, settings)
    target = hub_module.target(section, sleep)
    target.check_login()
    files = _files(run, settings, section, base, target.base_info(base))
    info = target.upload(files)
    facts = {
        "repo": section.repo,
        "url": f"{target.api.endpoint}/{section.repo}",
        "commit": info.sha,
        "visibility": "private" if info.private else "public",
        "uploaded": sorted(files),
    }
    run.mark("publish", [], **facts)
    return facts


def _published_base(run: Run, settings: Recipe) -> tuple[Publish, Base]:
    """Return the recipe's publish section and the base that the delta was trained on; raises PublishError."""
    section = publish_section(settings)
    stored = read_json(run.delta / "base.json")
    located = locate_base(settings.model, weights=False)
    if has_weights(located):
        refuse_other_base(run.manifest().get("base"), located, run.path, PublishError)
    base = Base(located.folder, stored["base"], stored["revision"], stored["hub_id"], located.converted)
    _check_base(section, base)
    return section, base


def _files(run: Run, settings: Recipe, publish: Publish, base: Base, info: ModelInfo | None) -> dict[str, Content]:
    """Return everything that goes to the Hub, by name; raises PublishError for a file that holds a secret."""
    files = _weights(run, publish, base) | _records(run, settings)
    files["README.md"] = card(run, read_license(publish, base, info)).encode()
    for name, content in files.items():
        check_private(name, content)
    return files


def check_private(name: str, content: Content) -> None:
    """Raise PublishError if a file holds a secret or, if llmtune wrote it, names a folder of this machine."""
    text = _text(content)
    token = get_token()
    kinds = [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]
    if kinds or (token and token in text):
        raise PublishError(
            f"{name} contains what looks like {(kinds or ['your Hub token'])[0]}; remove it, then publish"
        )
    if isinstance(content, bytes):
        folders = [
            re.escape(str(path)) for path in (home_folder(), Path.cwd(), gettempdir()) if path and len(str(path)) > 1
        ]
        match = _PRIVATE_PATH.search(text) or re.search(rf"(?<![\w.-])({'|'.join(folders)})(?![\w-])", text)
        if match:
            raise PublishError(f"{name} names a folder of this machine ({match[0]}...); nothing was uploaded")


def _text(content: Content) -> str:
    """Return a file's text; of a safetensors file, the header."""
    if isinstance(content, bytes):
        return content.decode(errors="replace")
    with content.open("rb") as file:
        size = int.from_bytes(file.read(8), "little") if content.suffix == ".safetensors" else -1
        return file.read(size).decode(errors="replace")


def _check_base(publish: Publish, base: Base) -> None:
    """Raise PublishError for the delta of a base that others cannot have: it is neither on the Hub nor in a package."""
    if publish.weights == "delta" and base.hub_id is None and not base.name.startswith("package:"):
        raise PublishError(
            f"the base {base.name} is not on the Hub, so nobody could load its delta; try publish.weights: merged"
        )


def _weights(run: Run, publish: Publish, base: Base) -> dict[str, Content]:
    """Return the allowed files of delta/ or merged/, as the step left them, but configs without private paths."""
    weights = publish.weights or "delta"
    step, folder = ("merge", run.merged) if weights == "merged" else ("train", run.delta)
    names = [(run.path / file).relative_to(folder).as_posix() for file in run.verify(step, PublishError)]
    allowed = [name for name in names if any(fnmatch(name, pattern) for pattern in ALLOWED[weights])]
    files: dict[str, Content] = {name: folder / name for name in allowed}
    for name in _CONFIGS & set(files):
        stored, clean = folder / name, _clean(name, read_json(folder / name), base)
        files[name] = stored.read_bytes() if clean == read_json(stored) else _json(clean)
    return files


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


def _records(run: Run, settings: Recipe) -> dict[str, Content]:
    """Return the recipe without paths, and the scores of the evaluation without the rows."""
    files: dict[str, Content] = {"recipe.yaml": dump(without_paths(settings)).encode()}
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
