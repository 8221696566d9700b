"""The header of a model card, through the Hub's own library, and the mark by which llmtune knows its own cards."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData

from llmtune.errors import FieldError, PublishError
from llmtune.files import digest_of
from llmtune.publishing.parts.hardware import footprint
from llmtune.publishing.parts.scores import hub_name, scores
from llmtune.recipe.sections import Publish, Recipe
from llmtune.run import Run

_SIGNATURE = re.compile(r"<!-- llmtune card ([0-9a-f]{64}) -->\n\Z")


def write_card(data: ModelCardData, text: str) -> str:
    """A card with a header and a text; raises PublishError for a header that would not read back as written."""
    fields = data.to_dict()  # type: ignore[no-untyped-call]
    # With every unusual character escaped: the Hub's own way of writing lets some through that end a line.
    card = f"---\n{yaml.safe_dump(fields, sort_keys=False, width=1 << 20)}---\n\n{text}"
    if any(read != fields for read in (front_matter(card), ModelCard(card).data.to_dict())):  # type: ignore[no-untyped-call]
        raise PublishError(
            "the model card's YAML header would not read back as written; remove unusual characters from the recipe"
        )
    return card


def front_matter(text: str) -> dict[str, Any]:
    """Read the YAML header of a README.md; empty if there is none or it cannot be read."""
    head = re.match(r"---\r?\n(.*?)^---\s*?$", text, re.DOTALL | re.MULTILINE)
    try:
        value = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def sign(text: str) -> str:
    """Add a hash to a README.md, by which llmtune knows its own card until somebody edits it."""
    return text + f"<!-- llmtune card {digest_of(text)} -->\n"


def is_ours(text: str) -> bool:
    """Tell whether llmtune wrote a README.md and nobody has edited it."""
    signature = _SIGNATURE.search(text)
    return signature is not None and signature[1] == digest_of(text[: signature.start()])


def publish_section(settings: Recipe) -> Publish:
    """The recipe's publish section with what it leaves open; raises FieldError without one."""
    if settings.publish is None:
        raise FieldError("publish", "is missing; add publish: {repo: owner/name} to the recipe")
    return settings.publish.model_copy(update={"weights": published_weights(settings)})


def published_weights(settings: Recipe) -> Literal["delta", "merged"]:
    """What goes to the Hub: what the recipe says, else the delta where PEFT itself loads it, else full weights."""
    if settings.publish and settings.publish.weights:
        return settings.publish.weights
    unmergeable = settings.method.adapter.unmergeable or not settings.merge.enabled
    return "delta" if _loads_with_peft(settings) or unmergeable else "merged"


def _loads_with_peft(settings: Recipe) -> bool:
    """Whether PEFT itself loads the delta: it has the adapter, and no tensor of the base was trained."""
    adapter = settings.method.adapter
    return not adapter.trains_base and not adapter.registered_by


def delta_note(settings: Recipe) -> str | None:
    """Why a delta that stock libraries do not load is published all the same, where the recipe does not ask for it."""
    asks = settings.publish is None or settings.publish.weights is not None
    if asks or published_weights(settings) == "merged" or _loads_with_peft(settings):
        return None
    adapter = settings.method.adapter
    reason = "no full weights can be made of it" if adapter.unmergeable else "merge.enabled is false"
    needs = "llmtune and the code on its card" if adapter.registered_by else "the code on its card"
    return f"publish: the delta alone, since {reason}; to load it takes {needs}"


def repository(settings: Recipe) -> str:
    """The recipe's publish.repo; raises FieldError without one."""
    return publish_section(settings).repo


def is_merged(settings: Recipe) -> bool:
    """Whether merged weights are published, not the delta."""
    return settings.publish is not None and published_weights(settings) == "merged"


def merge_facts(run: Run, settings: Recipe) -> dict[str, Any]:
    """What the merge recorded, where merged weights are published; nothing otherwise."""
    return dict(run.manifest()["steps"].get("merge") or {}) if is_merged(settings) else {}


def card_data(run: Run, settings: Recipe, base: Mapping[str, Any], license: Mapping[str, str]) -> ModelCardData:
    """The card's header: `base` is the delta's base.json, `license` the base's license, license_name, license_link.

    The delta of converted weights names no base on the Hub, as none there has the weights that it fits.
    """
    merged, is_adapter = is_merged(settings), base["kind"] == "adapter"
    origin = base["hub_id"] if merged or not base.get("converted") else None
    if settings.model.merge_into:
        origin = (merge_facts(run, settings).get("base") or base)["hub_id"]
    relation = "adapter" if is_adapter and not merged else "finetune"
    results, trained_on = scores(run, settings), footprint(run)
    more: dict[str, Any] = {"base_model_relation": relation} if origin else {}
    emissions = trained_on and trained_on.metadata(publish_section(settings).grid_gco2_per_kwh)
    more |= {"co2_eq_emissions": emissions} if emissions else {}
    return ModelCardData(
        base_model=origin,
        library_name="transformers" if merged else "peft" if is_adapter else None,
        pipeline_tag="text-generation",
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        tags=[*_tags(settings), *(["merge"] if run.combined else [])],
        datasets=None if run.combined else _datasets(settings) or None,
        model_name=repository(settings).rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
        **more,
    )


def _tags(settings: Recipe) -> list[str]:
    """The words that people search for: full is no name for the training of an adapter."""
    method = settings.method
    plan = [method.kind] if method.adapter.trains_base or method.stands_under else []
    return ["llmtune", *plan, *method.adapter.tags]


def _datasets(settings: Recipe) -> list[str]:
    """The names of the Hub data sets among the sources."""
    sources = [part.source for name in ("train", "eval", "test") for part in settings.data.sources(name)]
    return sorted({hub.name for source in sources if (hub := hub_name(source))})
