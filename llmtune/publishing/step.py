"""publish(run): uploads card, weights, recipe and scores to the Hub; private unless the recipe says public."""

import os
import shlex
import time
from pathlib import Path
from typing import Any

from huggingface_hub import ModelInfo

from llmtune.errors import FieldError, LlmtuneError, PublishError
from llmtune.files import read_json, write_folder
from llmtune.model.base import Base
from llmtune.model.check import has_weights
from llmtune.model.files.fingerprints import refuse_other_base
from llmtune.model.files.locate import locate_base
from llmtune.numbers import size
from llmtune.publishing import hub as hub_module
from llmtune.publishing.card import card
from llmtune.publishing.collection import add_to_collection, open_collection
from llmtune.publishing.files import exported, records, weights
from llmtune.publishing.header import delta_note, publish_section
from llmtune.publishing.hub import Content, Sleep
from llmtune.publishing.license import read_license
from llmtune.publishing.private import check_private
from llmtune.recipe.sections import Publish, Recipe
from llmtune.run import Run, locates_mistakes

PREVIEW = "publish"
"""The folder of a run for what a dry run writes."""


@locates_mistakes
def preflight(settings: Recipe, sleep: Sleep = time.sleep) -> None:
    """Raise PublishError, MachineError or RecipeError before training if the result could not be published."""
    if settings.publish is None:
        return
    publish = publish_section(settings)
    unmergeable = settings.method.adapter.unmergeable
    if publish.weights == "merged" and unmergeable:
        raise FieldError("publish.weights", f"merged is not possible: {unmergeable.message}; try delta")
    if publish.weights == "merged" and not settings.merge.enabled:
        raise FieldError("publish.weights", "merged needs merge.enabled: true; set that, or try delta")
    target = hub_module.target(publish, sleep)
    target.check_login()
    base = locate_base(settings.model, weights=False)
    _check_base(publish, base)
    read_license(publish, base, target.base_info(base))
    target.probe()
    if publish.collection:
        open_collection(target, publish.collection)
    _tell_delta(settings)


def _tell_delta(settings: Recipe) -> None:
    note = delta_note(settings)
    if note:
        print(note)


def publish(run: Run, sleep: Sleep = time.sleep) -> dict[str, Any]:
    """Upload what the recipe says and return where it is; raises PublishError with the command that tries again."""
    try:
        facts = _publish(run, run.recipe(), sleep)
    except LlmtuneError as error:
        command = f"llmtune publish {shlex.quote(str(run.path))}"
        again = " the same command" if run.settings else f": {command}"  # what --set gave is not kept yet
        raise type(error)(f"{error}. The trained weights are untouched; try again with{again}") from error
    where = f", in the collection {facts['collection']['title']!r}" if "collection" in facts else ""
    print(f"published: {facts['url']} ({facts['visibility']}), {len(facts['uploaded'])} files{where}")
    return facts


@locates_mistakes
def preview(run: Run) -> dict[str, Any]:
    """Write what `publish` would upload into the run's publish/ and ask nothing of the Hub; weights take no disk.

    Gives the sizes in bytes of all files that would go, by name; raises PublishError as `publish` does.
    """
    settings = run.recipe()
    section, base = _published_base(run, settings)
    _tell_delta(settings)
    files = _files(run, settings, section, base, None)
    folder = run.path / PREVIEW
    with write_folder(folder) as partial:
        for name, content in files.items():
            _place(content, partial / name)
    sizes = {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in sorted(files.items())}
    for name, count in sizes.items():
        print(f"{size(count):>8}  {name}")
    where = f" into the collection {section.collection!r}" if section.collection else ""
    print(f"would go to {section.repo} ({section.visibility}){where}; nothing was sent; it lies in {folder}")
    facts = {"repo": section.repo, "visibility": section.visibility, "bytes": sizes, "folder": str(folder)}
    return {**facts, "collection": section.collection} if section.collection else facts


def _place(content: Content, file: Path) -> None:
    """Write a text; of a file of the run, make a link."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
        return
    try:
        os.link(content.resolve(), file)
    except OSError:  # another disk, or one without hard links
        file.symlink_to(content.resolve())


@locates_mistakes
def _publish(run: Run, settings: Recipe, sleep: Sleep) -> dict[str, Any]:
    section, base = _published_base(run, settings)
    target = hub_module.target(section, sleep)
    target.check_login()
    files = _files(run, settings, section, base, target.base_info(base))
    info = target.upload(files)
    facts: dict[str, Any] = {
        "repo": section.repo,
        "url": f"{target.api.endpoint}/{section.repo}",
        "commit": info.sha,
        "visibility": "private" if info.private else "public",
        "uploaded": sorted(files),
    }
    if section.collection:
        facts["collection"] = add_to_collection(target, section.collection)
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
    files = weights(run, publish, base) | exported(run) | records(run, settings)
    files["README.md"] = card(run, read_license(publish, base, info)).encode()
    for name, content in files.items():
        check_private(name, content)
    return files


def _check_base(publish: Publish, base: Base) -> None:
    """Raise PublishError for the delta of a base that others cannot have: it is neither on the Hub nor in a package."""
    if publish.weights == "delta" and base.hub_id is None and not base.name.startswith("package:"):
        raise PublishError(
            f"the base {base.name} is not on the Hub, so nobody could load its delta; try publish.weights: merged"
        )
