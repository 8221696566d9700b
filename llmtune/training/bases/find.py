"""What a recipe goes on from: a run or an adapter, found by its name, and checked against base and recipe."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from llmtune.adapters.delta import BASE, TENSORS
from llmtune.errors import FieldError, MachineError, RecipeError
from llmtune.files import user_path, write_json
from llmtune.model.base import Base, load_config
from llmtune.model.check import has_weights
from llmtune.model.files.fingerprints import fingerprint_base
from llmtune.model.files.locate import ADAPTER, HUB_ID
from llmtune.model.layout import Layout
from llmtune.recipe.paths import describe_places, exists
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.training.bases.start import KEY, Start, check_start, load_start, settle


def find_start(recipe: Recipe) -> Start | None:
    """What the recipe goes on from; None where it says nothing. Raises FieldError where it is not there."""
    name = recipe.model.start
    if name is None:
        return None
    if exists(name):
        return _in_folder(name, user_path(name))
    hub_id, _, revision = name.partition("@")
    if HUB_ID.fullmatch(hub_id) and "/" in hub_id:
        return Start(name, _download(hub_id, revision or None))
    places = describe_places(name, recipe.folders(KEY))
    raise FieldError(KEY, f"no run or adapter {name} ({places})")


def load_found_start(recipe: Recipe, model: nn.Module, trained: Collection[str]) -> Start | None:
    """Put what a recipe's training goes on from, if anything, into a model; gives it."""
    start = find_start(recipe)
    if start is not None:
        load_start(model, start, trained)
    return start


def _in_folder(name: str, folder: Path) -> Start:
    if (folder / "recipe.yaml").is_file():
        run = Run(folder)
        if not run.done("train"):
            raise FieldError(KEY, f"the run {name} is not trained yet; first: llmtune train {name}")
        return Start(name, run.delta)
    if (folder / TENSORS).is_file() or (folder / ADAPTER).is_file():
        return Start(name, folder)
    raise FieldError(KEY, f"{name} is neither a run (recipe.yaml) nor an adapter ({ADAPTER})")


def _download(hub_id: str, revision: str | None) -> Path:
    """The files of an adapter on the Hub; raises FieldError where it cannot be had, or is none."""
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.json"]))
        if not any((folder / name).is_file() for name in (ADAPTER, BASE)):
            raise FieldError(KEY, f"{hub_id} on the Hub is no adapter ({ADAPTER})")
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        message = f"{hub_id} is no folder here, and the Hub does not give it (offline, or no such adapter?)"
        raise FieldError(KEY, message, MachineError) from error


def settled(recipe: Recipe, base: Base) -> Recipe:
    """The recipe with an adapter like the one that it goes on from; raises FieldError where they contradict."""
    start = find_start(recipe)
    if start is None:
        return recipe
    if not start.file.is_file():
        raise FieldError(KEY, f"{start.name} holds no {start.file.name}; pickled adapters are refused")
    _refuse_other_base(start, base)
    if not start.is_adapter and recipe.memory.frozen_blocks == "stream":
        raise FieldError("memory.frozen_blocks", f"stream reads the base alone, and {start.name} changes it; try auto")
    blocks = load_config(base).get_text_config().num_hidden_layers
    adapter = settle(recipe.method.adapter, start, blocks)
    name = start.name if "@" in start.name or not exists(start.name) else str(user_path(start.name).absolute())
    changed = {
        "model": recipe.model.model_copy(update={"start": name}),
        "method": recipe.method.model_copy(update={"adapter": adapter}),
    }
    return recipe.model_copy(update=changed)


def _refuse_other_base(start: Start, base: Base) -> None:
    """Raise FieldError where llmtune recorded another base of the start, by the SHA-256 of its files."""
    recorded = start.base
    if not recorded or not has_weights(base):
        return
    added = (recorded.get("added") or {}).get("ids", [])
    if added != list(base.added):
        remedy = f"write its {len(added)} tokens in the same order" if added else "remove that key"
        raise FieldError("model.add_tokens", f"are not those that {start.name} was trained with; {remedy}")
    before, now = recorded.get("files") or {}, fingerprint_base(base)
    decisive = sorted(name for name in {*before, *now} if name.endswith(".safetensors") or name == "config.json")
    other = next((name for name in decisive if before.get(name) != now.get(name)), None)
    if other:
        message = f"{start.name} was trained on the base {recorded['base']}, and not on {base.name}"
        raise FieldError(KEY, f"{message}, whose {other} differs; name that base in model.base")


def refuse_own_folder(recipe: Recipe, out: Path) -> None:
    """Raise FieldError for a run that would go on from itself."""
    start = recipe.model.start
    if start is not None and Path(start).resolve() in (out.resolve(), (out / "delta").resolve()):
        raise FieldError(KEY, f"{start} is the folder of this run itself; choose another with --out")


def check_layout(recipe: Recipe, layout: Layout) -> None:
    """Raise FieldError where what the recipe goes on from does not fit what it is to train."""
    start = find_start(recipe)
    if start is not None:
        check_start(start, layout.tuned, layout.linear[0])


def start_note(recipe: Recipe) -> list[str]:
    """A line on what the recipe goes on from."""
    start = find_start(recipe)
    if start is None:
        return []
    facts = start.facts()
    return [
        f"goes on from {facts['name']} ({facts['kind']}, SHA-256 {facts['sha256'][:12]}); the delta is against the base"
    ]


def rest_size(recipe: Recipe, layout: Layout) -> int:
    """How many numbers the delta holds that the recipe's start trained and the recipe does not."""
    start = find_start(recipe)
    if start is None or start.is_adapter:
        return 0
    return sum(math.prod(shape) for name, shape in start.shapes().items() if name not in layout.trained)


def bind_start(run: Run, name: str, begun: bool, write: bool) -> None:
    """Record what a run goes on from; raises RecipeError where it has changed since training began."""
    facts: dict[str, Any] = _named(run).facts()
    before = run.manifest().get("start")
    if begun and before and before["sha256"] != facts["sha256"]:
        message = f"{name}: changed since the run {run.path} began to train on it"
        raise RecipeError(f"{message}; put it back as it was, or start a new run with --out")
    if write and before != facts:
        write_json(run.manifest_file, {**run.manifest(), "start": facts})


def _named(run: Run) -> Start:
    start = find_start(run.recipe())
    assert start is not None
    return start
