"""Recipe -> a run folder in which everything is resolved: pinned base, learning rates, plan table, data findings."""

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from llmtune.data.encoding.dates import DATE, NOW, day_notes, with_day
from llmtune.data.findings import check_same_data
from llmtune.data.gate import Gate, check_sources, gate, split_rows
from llmtune.data.near.texts import suite_documents
from llmtune.errors import LlmtuneError
from llmtune.estimate.lengths import Lengths, counted, estimated
from llmtune.evaluation.questions import asking_context, check_questions
from llmtune.evaluation.vllm.engine import check_installed
from llmtune.files import read_json, write_json
from llmtune.frozen.stream import check_disk
from llmtune.launch.command import choose_config, count_processes
from llmtune.launch.engine import needs_sharding
from llmtune.machine.gpus import smallest_gpu
from llmtune.model.base import Base, load_config
from llmtune.model.files.fingerprints import TOKENIZER, hash_beside, named_like
from llmtune.model.layout import Layout
from llmtune.model.tokens import load_tokenizer, model_limits, stop_ids
from llmtune.numbers import size
from llmtune.plan.stages import Facts
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe, load
from llmtune.recipe.standing import standing
from llmtune.recipe.suite import HELD_OUT, check_rows, load_suite, needs_lm_eval
from llmtune.run import Run, create, locates_mistakes
from llmtune.training.bases.base import bind_base, check_model, locate
from llmtune.training.bases.find import refuse_own_folder
from llmtune.training.plan_table import build_layout, plan_table
from llmtune.training.selection.answers import check_validation
from llmtune.working import working


@dataclass(frozen=True)
class Examination:
    """What a recipe comes to before a run is made: its encoded data, its plan's table, the plan laid over the model."""

    data: Gate
    table: PlanTable
    layout: Layout

    @property
    def lengths(self) -> Lengths:
        """The lengths of the training rows."""
        return counted(self.data.train)


@dataclass(frozen=True)
class Outline:
    """What a recipe comes to where its rows are counted but not tokenized."""

    table: PlanTable
    layout: Layout
    lengths: Lengths


@dataclass(frozen=True)
class Prepared:
    """A run folder, and what was computed on the way to it."""

    run: Run
    base: Base
    data: Gate
    layout: Layout


def prepare(recipe: Recipe, out: Path, gpus: int, overwrite: bool = False) -> Run:
    """The run folder of a recipe, checked and resolved; an unfinished run of the same recipe is opened again."""
    return prepare_all(recipe, out, gpus, overwrite).run


@locates_mistakes
def prepare_all(recipe: Recipe, out: Path, gpus: int, overwrite: bool = False) -> Prepared:
    """What `prepare` makes, with the base, the encoded data and the plan laid over the model."""
    recipe, base = locate(recipe)
    refuse_own_folder(recipe, out)
    hash_beside(base)
    recipe = _with_day(recipe, base, out)
    examination = examine(recipe, gpus, base)
    run = create(resolve(recipe, base, examination.layout.facts), out, overwrite)
    bind_base(run, run.recipe(), base)
    if _training_begun(run):
        check_same_data(run, examination.data.findings)
    _record(run, examination)
    return Prepared(run, base, examination.data, examination.layout)


def _with_day(recipe: Recipe, base: Base, out: Path) -> Recipe:
    """The recipe with the day that the chat template would write, or the one that the run in `out` began on."""
    files = [file for file in named_like(base.folder, TOKENIZER) if file.suffix in (".jinja", ".json")]
    if not any(NOW in file.read_text(encoding="utf-8", errors="replace") for file in files):
        return recipe
    values = dict(recipe.data.template)
    with suppress(LlmtuneError):
        began = load(out / "recipe.yaml").data.template
        values |= {DATE: began[DATE]} if DATE in began and DATE not in values else {}
    dated = with_day(load_tokenizer(base).chat_template, values, date.today())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"template": dated})})


@locates_mistakes
def complete(run: Run, gpus: int) -> None:
    """Write the plan and the findings of a run that was killed, or found no disk, before they were written.

    Raises LlmtuneError where they are gone though training has begun.
    """
    if all(_is_json(file) for file in (run.plan_file, run.data_file)):
        return
    begun = _training_begun(run)
    if begun:
        lost = run.data_file if _is_json(run.plan_file) else run.plan_file
        raise LlmtuneError(f"{lost}: is gone or damaged, and {begun} needs it; start a new run with --out")
    _record(run, examine(run.recipe(), gpus))


def _record(run: Run, examination: Examination) -> None:
    write_json(run.plan_file, examination.table.to_json())
    write_json(run.data_file, examination.data.findings)


def _training_begun(run: Run) -> Path | None:
    """What a training left that needs the run's plan and findings as they are; None where there is nothing."""
    return next((path for path in (run.delta, *run.checkpoints.glob("step-*")) if path.exists()), None)


def _is_json(file: Path) -> bool:
    try:
        read_json(file)
    except LlmtuneError:
        return False
    return True


@locates_mistakes
def examine(recipe: Recipe, gpus: int, base: Base | None = None) -> Examination:
    """Check a recipe's data, plan and suite; raises RecipeError for the first thing that cannot be."""
    if base is None:
        recipe, base = locate(recipe, weights=False)
    suite = load_suite(recipe.eval.suite, recipe.folders("eval.suite")) if recipe.eval.suite != "none" else None
    layout = build_layout(recipe, base, check_model(recipe, base))
    tokenizer, stop = load_tokenizer(base), stop_ids(base)
    with working("reading and checking the data"):
        checked = gate(recipe, tokenizer, stop, model_limits(layout.skeleton), suite_documents(suite))
    check_validation(recipe, checked.eval)
    checked.findings["notes"] += day_notes(tokenizer.chat_template, recipe.data.template)
    if suite:
        check_rows(suite, len(checked.test))
    if recipe.data.test or (suite and HELD_OUT in suite.tasks):
        context = asking_context(recipe, load_config(base))
        checked.findings["notes"] += check_questions(recipe, checked, tokenizer, stop, context)
    world = count_processes(recipe.launch, choose_config(recipe.launch, gpus), gpus)
    tokens = sum(counted(examples).tokens for examples in (checked.train, checked.eval))
    table = plan_table(recipe, base, layout, len(checked.train), world).with_tokens(tokens)
    table = replace(table, notes=[*table.notes, *_launch_notes(recipe, table, gpus)])
    check_disk(recipe, table.frozen_blocks, world)
    if suite and recipe.eval.backend == "vllm":
        check_installed()
    if suite and needs_lm_eval(suite):
        from llmtune.evaluation.tasks import load_tasks

        load_tasks(suite)
    return Examination(checked, table, layout)


def plan_alone(recipe: Recipe, gpus: int) -> PlanTable:
    """The plan table of a recipe whose training rows are counted but not tokenized."""
    return outline(recipe, gpus).table


@locates_mistakes
def outline(recipe: Recipe, gpus: int) -> Outline:
    """The plan of a recipe whose training rows are counted but not tokenized, and their lengths by their characters."""
    recipe, base = locate(recipe, weights=False)
    check_sources(recipe)
    layout = build_layout(recipe, base, check_model(recipe, base))
    world = count_processes(recipe.launch, choose_config(recipe.launch, gpus), gpus)
    rows, _ = split_rows(recipe.data, recipe.train.seed)
    table = plan_table(recipe, base, layout, len(rows), world)
    table = replace(table, notes=[*table.notes, *_launch_notes(recipe, table, gpus)])
    return Outline(table, layout, estimated(rows, recipe.data.max_length))


@locates_mistakes
def layout_of(recipe: Recipe) -> Layout:
    """A recipe's plan laid over its base."""
    recipe, base = locate(recipe, weights=False)
    return build_layout(recipe, base, check_model(recipe, base))


def choose_launch(recipe: Recipe, gpus: int) -> Recipe:
    """The recipe with fsdp2 in place of auto, and a line on it, where one of several GPUs is too small for the states.

    Raises RecipeError as `plan_alone`, which sizes them.
    """
    table = plan_alone(recipe, gpus)
    print(*(f"{note}\n" for note in _launch_notes(recipe, table, gpus)), sep="", end="", flush=True)
    return as_launched(recipe, table, gpus)


def as_launched(recipe: Recipe, table: PlanTable, gpus: int) -> Recipe:
    """The recipe with fsdp2 in place of auto, where one of this machine's GPUs is too small for the states."""
    sharded = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"accelerate": "fsdp2"})})
    return sharded if _launch_notes(recipe, table, gpus) else recipe


def _launch_notes(recipe: Recipe, table: PlanTable, gpus: int) -> list[str]:
    """A line where auto shards over this machine's GPUs."""
    if not recipe.launch.is_open or gpus < 2:
        return []
    memory = smallest_gpu()
    if not needs_sharding(recipe, table.states_bytes, memory):
        return []
    sizes = f"weights, gradients and optimizer states take {size(table.states_bytes)}, and a GPU has {size(memory)}"
    return [f"launch: fsdp2, which shards the model: {sizes}"]


def resolve(recipe: Recipe, base: Base, facts: Facts) -> Recipe:
    """The recipe with revision, rates and absolute file paths, the suite's too, written out."""
    revision = base.revision if base.hub_id == base.name else recipe.model.revision
    named = recipe.model.model_copy(update={"base": base.name})
    return standing(recipe.model_copy(update={"model": named})).resolved(facts, revision)
