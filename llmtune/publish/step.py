"""publish(run): a card and the weights to the Hub, private unless the recipe says public; nothing else goes out."""

import json
import re
import shlex
import time
from fnmatch import fnmatch
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from huggingface_hub import get_token

from llmtune.errors import FieldError, LlmtuneError, PublishError
from llmtune.files import fingerprint, read_json
from llmtune.merge.step import COPIED
from llmtune.model.base import Base, locate_base
from llmtune.publish import hub as hub_module
from llmtune.publish.card import card, front_matter, shorten, shortened
from llmtune.publish.hub import Content, Sleep, Target
from llmtune.recipe.sections import Publish, Recipe, dump
from llmtune.run import Run, locates_mistakes

ALLOWED = {
    "delta": ("adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "base.json"),
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
    """Before training: raise PublishError, MachineError or RecipeError where the result could not be published."""
    publish = settings.publish
    if publish is None:
        return
    if publish.weights == "merged" and not settings.merge.enabled:
        raise FieldError("publish.weights", "merged needs merge.enabled: true; the nearest valid is delta")
    target = hub_module.target(publish, sleep)
    target.check_login()
    base = locate_base(settings.model, weights=False)
    _check_base(publish, base.name, base.hub_id)
    license(target, base)
    target.probe()


@locates_mistakes
def publish(run: Run, sleep: Sleep = time.sleep) -> dict[str, Any]:
    """Upload what the recipe says and give where it is; raises PublishError with the command that tries again."""
    try:
        facts = _publish(run, run.recipe(), sleep)
    except LlmtuneError as error:
        again = f"llmtune publish {shlex.quote(str(run.path))}"
        raise type(error)(f"{error}. What was trained is untouched; try again with: {again}") from error
    print(f"published: {facts['url']} ({facts['visibility']}), {len(facts['uploaded'])} files")
    return facts


def _publish(run: Run, settings: Recipe, sleep: Sleep) -> dict[str, Any]:
    if settings.publish is None:
        raise FieldError("publish", "is not in the recipe; give publish: {repo: owner/name}")
    stored = read_json(run.delta / "base.json")
    base = Base(locate_base(settings.model, weights=False).folder, stored["base"], stored["revision"], stored["hub_id"])
    _check_base(settings.publish, base.name, base.hub_id)
    files = _weights(run, settings.publish, base) | _records(run, settings)
    target = hub_module.target(settings.publish, sleep)
    target.check_login()
    files["README.md"] = card(run, license(target, base)).encode()
    for name, content in files.items():
        check_private(name, content)
    found = target.upload(files)
    facts = {
        "repo": settings.publish.repo,
        "url": f"{target.api.endpoint}/{settings.publish.repo}",
        "commit": found.sha,
        "visibility": "private" if found.private else "public",
        "uploaded": sorted(files),
    }
    run.mark("publish", [], **facts)
    return facts


def license(target: Target, base: Base) -> dict[str, str]:
    """The base's license by its card; raises PublishError where a public copy of a base is not for us to make."""
    info = target.info(base.hub_id) if base.hub_id else None
    readme = base.folder / "README.md"
    fields = front_matter(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else {}
    if not fields and info is not None and info.card_data is not None:
        fields = info.card_data.to_dict()  # type: ignore[no-untyped-call]
    found = {key: str(fields[key]) for key in ("license", "license_name", "license_link") if fields.get(key)}
    if target.publish.visibility == "public":
        if info is not None and info.gated:
            raise PublishError(
                f"the base {base.hub_id} is gated, so its tuned copy is not made public; publish privately"
            )
        if "license" not in found:
            raise PublishError(
                f"the license of {shorten(base.name)} is not known, so nothing is made public; publish privately"
            )
    return found


def check_private(name: str, content: Content) -> None:
    """Raise PublishError where a file holds a secret or, if llmtune wrote it, the name of a folder of this machine."""
    text = _text(content)
    token = get_token()
    kinds = [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]
    if kinds or (token and token in text):
        raise PublishError(f"{name} holds what looks like {(kinds or ['your Hub token'])[0]}; remove it, then publish")
    if isinstance(content, bytes):
        places = [re.escape(str(place)) for place in (Path.home(), Path.cwd(), gettempdir()) if len(str(place)) > 1]
        found = _PRIVATE_PATH.search(text) or re.search(rf"(?<![\w.-])({'|'.join(places)})(?![\w-])", text)
        if found:
            raise PublishError(f"{name} names a folder of this machine ({found[0]}...); nothing was uploaded")


def _text(content: Content) -> str:
    """A file's text; of weights, the header."""
    if isinstance(content, bytes):
        return content.decode(errors="replace")
    with content.open("rb") as file:
        size = int.from_bytes(file.read(8), "little") if content.suffix == ".safetensors" else -1
        return file.read(size).decode(errors="replace")


def _check_base(publish: Publish, name: str, hub_id: str | None) -> None:
    if publish.weights == "delta" and hub_id is None:
        raise PublishError(
            f"the base {name} is not on the Hub, so nobody could load its delta; publish.weights: merged is complete"
        )


def _weights(run: Run, publish: Publish, base: Base) -> dict[str, Content]:
    """The allowed files of delta or merged folder, each the one that its step left; configs without private paths."""
    step, folder = ("merge", run.merged) if publish.weights == "merged" else ("train", run.delta)
    if not run.done(step):
        raise PublishError(f"{folder} is not there or not whole; first: llmtune {step} {shlex.quote(str(run.path))}")
    listed = run.manifest()["steps"][step]["files"]
    files: dict[str, Content] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if not any(fnmatch(name, pattern) for pattern in ALLOWED[publish.weights]):
            continue
        if listed.get(path.relative_to(run.path).as_posix()) != fingerprint(path):
            raise PublishError(f"{path} is not what llmtune {step} left; do that again")
        files[name] = path
    for name in _CONFIGS & set(files):
        stored, clean = folder / name, _clean(name, read_json(folder / name), base)
        files[name] = stored.read_bytes() if clean == read_json(stored) else _json(clean)
    return files


def _clean(name: str, config: dict[str, Any], base: Base) -> dict[str, Any]:
    """A config that names its base as the Hub does, and no folder of this machine."""
    if name == "adapter_config.json":
        commit = (
            base.revision if base.name == base.hub_id and re.fullmatch(r"[0-9a-f]{40}", base.revision or "") else None
        )
        return {**config, "base_model_name_or_path": base.hub_id, "revision": commit}
    if name == "base.json":
        return dict(shorten(config))
    return {key: value for key, value in config.items() if not key.endswith("name_or_path") or shorten(value) == value}


def _records(run: Run, settings: Recipe) -> dict[str, Content]:
    """The recipe without paths, and the numbers of the evaluation without the rows."""
    files: dict[str, Content] = {"recipe.yaml": dump(shortened(settings)).encode()}
    if run.done("eval"):
        stored = [run.eval / name for name in ("base.json", "tuned.json") if (run.eval / name).is_file()]
        files |= {f"eval/{file.name}": _json(numbers(read_json(file))) for file in stored}
    return files


def numbers(value: Any) -> Any:
    """A result without its rows: of mappings the numbers and the words that name something, of lists nothing."""
    if not isinstance(value, dict):
        return value
    kept = {
        key: numbers(one) for key, one in value.items() if isinstance(one, dict | int | float | None) or _names(one)
    }
    return {key: one for key, one in kept.items() if one != {}}


def _names(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.:/-]{1,80}", value) is not None and shorten(value) == value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
