"""The base of a recipe: where it is, whether the recipe can train it, and whether a run has it still."""

from transformers import PreTrainedModel

from llmtune.errors import FieldError, RecipeError
from llmtune.files import write_json
from llmtune.model.base import Base, build_skeleton, load_config
from llmtune.model.check import check_base, check_same_shapes, check_stored
from llmtune.model.files.fingerprints import describe_base, refuse_other_base
from llmtune.model.files.locate import HUB_ID, INTO, locate_base, locate_original
from llmtune.recipe.paths import describe_places, exists
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.training.bases.find import bind_start, settled
from llmtune.training.bases.start import KEY


def locate(recipe: Recipe, weights: bool = True) -> tuple[Recipe, Base]:
    """The recipe's base, and the recipe with what it leaves open as it is in what it goes on from.

    Raises FieldError that names every place where a path was looked for.
    """
    name = recipe.model.base
    is_path = name.endswith(".gguf") or not (HUB_ID.fullmatch(name) or name.startswith("package:"))
    if is_path and not exists(name):
        places = describe_places(name, recipe.folders("model.base"))
        raise FieldError("model.base", f"no file or folder {name} ({places})")
    base = locate_base(recipe.model, weights)
    if base.start is None:
        return settled(recipe, base), base
    if recipe.model.start is not None:
        message = f"{name} is an adapter, and another is named here"
        raise FieldError(KEY, f"{message}; write its base in model.base, or remove this key")
    revision = base.revision if base.hub_id == base.name else None
    model = recipe.model.model_copy(update={"base": base.name, "revision": revision, "start": base.start})
    return settled(recipe.model_copy(update={"model": model}), base), base


def check_model(recipe: Recipe, base: Base) -> PreTrainedModel:
    """The base's skeleton; raises FieldError where its files are not that model's, or the recipe cannot train them."""
    adapter, model = recipe.method.adapter, recipe.model
    check_stored(
        base.name,
        load_config(base),
        {
            "method.adapter": adapter.trains_base,
            "model.quantize": model.quantize != "none",
            "model.merge_into": model.merge_into is not None,
            "memory.frozen_blocks": recipe.memory.frozen_blocks == "stream",
            "merge.enabled": recipe.merge.enabled and model.merge_into is None,
        },
    )
    skeleton = build_skeleton(base)
    check_base(base, skeleton)
    if model.merge_into is not None:
        if adapter.trains_base:
            raise FieldError(INTO, "takes an adapter, and here whole tensors train; remove that key")
        check_same_shapes(base, skeleton, locate_original(model.merge_into, model.add_tokens, weights=False))
    return skeleton


def bind_base(run: Run, recipe: Recipe, base: Base, write: bool = True) -> None:
    """Record the base, and what training goes on from, in a new run, with `write`.

    Raises RecipeError for others than those that a begun run recorded.
    """
    begun = run.done("train") or any(run.checkpoints.glob("step-*"))
    if begun:
        refuse_other_base(run.manifest().get("base"), base, run.path, RecipeError)
    if write and (run.manifest().get("base") is None or not run.done("train")):
        write_json(run.manifest_file, {**run.manifest(), "base": describe_base(base)})
    if recipe.model.start is not None and not run.done("train"):
        bind_start(run, recipe.model.start, begun, write)
