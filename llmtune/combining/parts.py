"""The runs that are combined: their deltas as they were trained, of one base and of one kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open

from llmtune.adapters.base import AdapterSpec
from llmtune.adapters.delta import ADAPTER, BASE, TENSORS
from llmtune.adapters.kinds import KINDS
from llmtune.combining.request import Request
from llmtune.errors import RecipeError
from llmtune.files import read_json
from llmtune.model.files.locate import ADAPTER as ADAPTER_CONFIG
from llmtune.recipe.sections import Recipe
from llmtune.run import Run

_NEEDS_ONE_RANK = "needs one rank in every layer; --how linear joins any"


@dataclass(frozen=True)
class Part:
    """A trained run that goes into a combination."""

    run: Run
    name: str
    """Its folder's name; of several with one name, the later ones with their place."""
    settings: Recipe
    weight: float
    base: dict[str, Any]
    """What its delta records of its base."""
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 of its delta's files."""

    @property
    def adapter(self) -> type[AdapterSpec]:
        """What was trained: a kind of adapter, or the model's own tensors."""
        return KINDS[self.base["adapter"]]

    @property
    def sha256(self) -> str:
        """The SHA-256 of its tensors."""
        file = TENSORS if self.adapter.trains_base else ADAPTER
        return str(self.files[f"delta/{file}"]["sha256"])

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration of its adapter; empty where there is none."""
        return {} if self.adapter.trains_base else dict(read_json(self.run.delta / ADAPTER_CONFIG))

    def ranks(self) -> set[int]:
        """The ranks that its LoRA has in its layers."""
        with safe_open(self.run.delta / ADAPTER, framework="pt") as stored:
            names = [name for name in stored.keys() if ".lora_A." in name]  # noqa: SIM118
            return {stored.get_slice(name).get_shape()[0] for name in names}


def read_parts(runs: Sequence[Run], request: Request) -> list[Part]:
    """The runs with their weights; raises RecipeError for what cannot be joined, ProofError for a changed delta."""
    verified = [run.verify("train") for run in runs]
    parts = [
        Part(run, name, run.recipe(), weight, read_json(run.delta / BASE), files)
        for run, name, weight, files in zip(runs, _names(runs), request.weights, verified, strict=True)
    ]
    first, seen = parts[0], {parts[0].sha256: parts[0]}
    _check_joinable(first, request.how)
    for part in parts[1:]:
        if part.sha256 in seen:
            same = seen[part.sha256].run.path
            raise RecipeError(f"{part.run.path}: holds the same delta as {same}; name each run once")
        seen[part.sha256] = part
        _refuse_other_base(first, part)
        _refuse_other_kind(first, part)
        _check_joinable(part, request.how)
    if request.how != "linear" and not first.adapter.trains_base:
        _refuse_other_ranks(parts, request.how)
    return parts


def _names(runs: Sequence[Run]) -> list[str]:
    folders = [run.path.resolve().name for run in runs]
    return [f"{name} ({place + 1})" if name in folders[:place] else name for place, name in enumerate(folders)]


def _refuse_other_base(first: Part, other: Part) -> None:
    """Raise RecipeError for deltas of two bases, by the SHA-256 of their weights and configuration."""
    if (first.base.get("added") or {}).get("ids") != (other.base.get("added") or {}).get("ids"):
        message = f"was trained with other model.add_tokens than {first.run.path}"
        raise RecipeError(f"{other.run.path}: {message}; deltas of one base join")
    one, two = (_decisive(part.base) for part in (first, other))
    if one != two:
        name = next(file for file in sorted({*one, *two}) if one.get(file) != two.get(file))
        message = f"was trained on {_named(other.base)}, and {first.run.path} on {_named(first.base)}"
        raise RecipeError(f"{other.run.path}: {message}, whose {name} differs; deltas of one base join")


def _decisive(base: dict[str, Any]) -> dict[str, str]:
    files = base.get("files") or {}
    return {
        name: one["sha256"] for name, one in files.items() if name.endswith(".safetensors") or name == "config.json"
    }


def _named(base: dict[str, Any]) -> str:
    revision = f" at revision {base['revision']}" if base["revision"] else ""
    return f"{base['base']}{revision}"


def _refuse_other_kind(first: Part, other: Part) -> None:
    if first.adapter is not other.adapter:
        ours, theirs = (_words(part.adapter) for part in (first, other))
        message = f"trained {theirs}, and {first.run.path} {ours}"
        raise RecipeError(f"{other.run.path}: {message}; deltas of one kind join: train both under one method.adapter")


def _words(adapter: type[AdapterSpec]) -> str:
    return "the model's own tensors" if adapter.trains_base else f"an adapter ({adapter.name})"


def _check_joinable(part: Part, how: str) -> None:
    """Raise RecipeError for a delta that cannot be joined with any, and say why."""
    if reason := part.adapter.unjoinable(part.config, how):
        raise RecipeError(f"{part.run.path}: {reason}")


def _refuse_other_ranks(parts: Sequence[Part], how: str) -> None:
    """Raise RecipeError where layers have LoRA of several ranks."""
    ranks: set[int] = set()
    for part in parts:
        ranks |= part.ranks()
        if len(ranks) > 1:
            words = ", ".join(map(str, sorted(ranks)))
            raise RecipeError(f"{part.run.path}: the ranks {words} are to be joined, and {how} {_NEEDS_ONE_RANK}")
