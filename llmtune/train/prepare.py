"""Recipe -> a run folder in which everything is resolved: pinned base, learning rates, plan table, data findings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.data.gate import Gate, gate
from llmtune.data.rows import read
from llmtune.files import write_json
from llmtune.frozen.stream import check_disk
from llmtune.launch.command import choose_config, count_processes
from llmtune.model.base import Base, build_skeleton, load_tokenizer, locate_base, model_facts, stop_ids
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import check_rows, load_suite, needs_lm_eval, resolve_suite
from llmtune.run import Run, create, locates_mistakes
from llmtune.train.plan_table import plan_table, total_steps


@dataclass(frozen=True)
class Prepared:
    """A run folder, and what was found out on the way to it, which takes time to find out again."""

    run: Run
    base: Base
    data: Gate


def prepare(recipe: Recipe, out: Path, gpus: int, overwrite: bool = False) -> Run:
    """The run folder of a recipe, checked and resolved; an unfinished run of the same recipe is opened again."""
    return prepare_all(recipe, out, gpus, overwrite).run


@locates_mistakes
def prepare_all(recipe: Recipe, out: Path, gpus: int, overwrite: bool = False) -> Prepared:
    """What `prepare` makes, with the base and the encoded data."""
    base = locate_base(recipe.model)
    checked, table = examine(recipe, gpus, base)
    resolved = resolve(recipe, base)
    made = create(resolved, out, overwrite)
    write_json(made.plan_file, table)
    write_json(made.data_file, checked.findings)
    return Prepared(made, base, checked)


@locates_mistakes
def examine(recipe: Recipe, gpus: int, base: Base | None = None) -> tuple[Gate, dict[str, Any]]:
    """The data gate's findings and the plan table of a recipe; raises for a suite that could not be asked either."""
    base = base or locate_base(recipe.model, weights=False)
    asked = load_suite(recipe.eval.suite) if recipe.eval.suite != "none" else None
    checked = gate(recipe, load_tokenizer(base), stop_ids(base))
    world = count_processes(recipe.launch, choose_config(recipe.launch, gpus), gpus)
    table = plan_table(recipe, base, total_steps(recipe, len(checked.train), world))
    tokens = sum(len(example.input_ids) for example in [*checked.train, *checked.eval])
    table["frozen_blocks"]["bytes"] = tokens * table["frozen_blocks"]["bytes_per_token"]
    check_disk(recipe, table["frozen_blocks"], world)
    if asked:
        check_rows(asked, len(checked.test))
        if needs_lm_eval(asked):
            from llmtune.evaluate.tasks import load_tasks

            load_tasks(asked)
    return checked, table


@locates_mistakes
def plan_alone(recipe: Recipe, gpus: int) -> dict[str, Any]:
    """The plan table of a recipe whose training rows are counted but not tokenised."""
    base = locate_base(recipe.model, weights=False)
    world = count_processes(recipe.launch, choose_config(recipe.launch, gpus), gpus)
    count = len(read(recipe.data.train))
    return plan_table(recipe, base, total_steps(recipe, count, world))


def resolve(recipe: Recipe, base: Base) -> Recipe:
    """The recipe with revision, rates and absolute file paths, the suite's too, written out."""
    facts = model_facts(build_skeleton(base))
    files = {key: _absolute(getattr(recipe.data, key)) for key in ("train", "eval", "test")}
    revision = base.revision if base.hub_id == base.name else recipe.model.revision
    changed = {
        "model": recipe.model.model_copy(update={"base": base.name, "revision": revision}),
        "data": recipe.data.model_copy(update=files),
        "method": recipe.method.resolved(facts),
        "eval": recipe.eval.model_copy(update={"suite": resolve_suite(recipe.eval.suite)}),
    }
    return recipe.model_copy(update=changed)


def _absolute(source: str | None) -> str | None:
    return str(Path(source).expanduser().absolute()) if source and Path(source).expanduser().exists() else source
