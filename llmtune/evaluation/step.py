"""evaluate(run): base and tuned model on the same questions under the same settings, with everything to repeat it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from llmtune.adapters.delta import load_delta
from llmtune.errors import ProofError, RecipeError
from llmtune.evaluation.asking import ask
from llmtune.evaluation.boundary import lacks_named
from llmtune.evaluation.exam import Exam, make_exam, settings_of
from llmtune.evaluation.generate import refuse_broken
from llmtune.evaluation.questions import context_length
from llmtune.evaluation.results import Evaluation, Evaluations, differences
from llmtune.evaluation.reuse.answers import BaseAnswers
from llmtune.evaluation.reuse.facts import model_facts
from llmtune.evaluation.spread.children import evaluate_in_children, wants_children
from llmtune.evaluation.tables import batch_notes
from llmtune.evaluation.tasks import load_tasks_and_groups
from llmtune.evaluation.vllm import models
from llmtune.evaluation.vllm.engine import VllmModel
from llmtune.files import as_json, write_folder, write_json
from llmtune.inference.placement import Placement, load_placed, place
from llmtune.inference.room import measured_once
from llmtune.kernels.finite import is_finite
from llmtune.machine import processes
from llmtune.model.base import Base, load_config
from llmtune.model.files.fingerprints import fingerprint_base, refuse_other_base
from llmtune.model.files.locate import locate_base
from llmtune.recipe.sections import Recipe
from llmtune.recipe.suite import HELD_OUT, load_suite
from llmtune.run import Run, locates_mistakes
from llmtune.working import working

_PROBE = "The quick brown fox jumps over the lazy dog."


@locates_mistakes
def evaluate(run: Run, unasked: str | None = None) -> Evaluations:
    """Evaluate base and tuned model on the recipe's suite; writes eval/base.json, tuned.json and settings.json.

    `unasked` says why the base is not asked, where its answers would be worth nothing; the tuned model is then asked in
    this process. Else several processes share the questions out, where the launch section means them. Raises
    RecipeError for a bad suite, MachineError for what this machine lacks, ProofError for a changed delta or for what
    cannot be scored.
    """
    recipe = run.recipe()
    # vLLM starts processes of its own.
    several = unasked is None and recipe.eval.backend != "vllm" and wants_children(recipe.launch)
    return evaluate_in_children(run) if several else evaluate_here(run, unasked)


@locates_mistakes
def evaluate_here(run: Run, unasked: str | None = None) -> Evaluations:
    """Evaluate as `evaluate` does, in this process and those that it has joined; the first one writes."""
    with lacks_named("evaluation"):
        with working("preparing the evaluation"):
            delta = {Path(name).name: facts["sha256"] for name, facts in run.verify("train").items()}
            _check_delta(run.delta)
        asked = _prepare(run)
        with measured_once(asked.model):  # both models are asked in the same batches
            before = _ask_base(asked) if unasked is None else _unasked_base(asked, unasked)
            with working("loading the tuned model"):
                tuned = _load_tuned(asked.model, run, asked.recipe, asked.placement.dtype)
                _check_logits(asked.exam, tuned, "tuned")
            answers = ask(asked.exam, tuned)
        after = cast(Evaluation, _about(asked, "tuned") | {"delta": delta} | answers)
        for note in batch_notes(after, before):
            print(f"note: {note}", flush=True)
        stored: Evaluations = {
            "base": before,
            "tuned": {**after, "differences": differences(after, before)},
            "settings": _settings(asked, delta),
        }
        if processes.rank():
            return stored
        _write(run, stored)
    facts = {"suite": asked.recipe.eval.suite, "limit": asked.exam.limit, "base_answers": asked.kept.seconds()}
    run.mark("eval", [run.eval / f"{name}.json" for name in stored], **facts)
    return stored


@locates_mistakes
def ask_base(run: Run) -> Evaluation:
    """Ask the base of a run alone, trained or not, in this process; writes nothing into the run.

    Its answers are kept for evaluations on the same base. Raises as `evaluate` does.
    """
    with lacks_named("evaluation"):
        asked = _prepare(run)
        with measured_once(asked.model):
            return _ask_base(asked)


@dataclass(frozen=True)
class _Asked:
    """A loaded base and what it is asked."""

    recipe: Recipe
    model: Any
    placement: Placement
    exam: Exam
    origin: dict[str, Any]
    """What names the base in results."""
    settings: dict[str, Any]
    kept: BaseAnswers


def _prepare(run: Run) -> _Asked:
    """Load a run's base and prepare what it is asked."""
    recipe = run.recipe()
    with working("preparing the evaluation"):
        if recipe.eval.backend == "vllm":
            models.check_run(run, recipe)
        suite = load_suite(recipe.eval.suite)
        with processes.ahead(processes.rank() == 0):  # the others find in the cache what it fetches
            tasks, groups = load_tasks_and_groups(suite)
        base = locate_base(recipe.model)
        refuse_other_base(run.manifest().get("base"), base, run.path, RecipeError)
        placement = place(recipe, base)
        model = _load_base(base, recipe, placement)
        exam = make_exam(run, suite, tasks, groups, getattr(model, "skeleton", model), base)
        settings = settings_of(recipe, exam, placement)
        origin = {"name": base.name, "revision": base.revision, "hub_id": base.hub_id, "weights": _weights(base)}
        kept = BaseAnswers(exam, model_facts(recipe, base, placement, settings))
        _check_logits(exam, model, "base")
    return _Asked(recipe, model, placement, exam, origin, settings, kept)


def _ask_base(asked: _Asked) -> Evaluation:
    """Return the base's answers, those that were kept and those that are given now."""
    return cast(Evaluation, _about(asked, "base") | ask(asked.exam, asked.model, asked.kept))


def _unasked_base(asked: _Asked, why: str) -> Evaluation:
    """Return an evaluation of the base without any answer."""
    return cast(Evaluation, _about(asked, "base") | {"unasked": why, "results": {}, "rows": []})


def _about(asked: _Asked, model: str) -> dict[str, Any]:
    """Return what an evaluation of a model holds beside its answers."""
    return {"model": model, "base": asked.origin, "delta": None, "settings": asked.settings}


def _settings(asked: _Asked, delta: dict[str, str]) -> dict[str, Any]:
    """Return what is needed to repeat an evaluation."""
    return asked.settings | {
        "eval": as_json(asked.recipe.eval.model_dump()),
        "base": asked.origin,
        "delta": delta,
        "configs": {task.task_name: as_json(task.dump_config()) for task in asked.exam.tasks},
    }


def _load_base(base: Base, recipe: Recipe, placement: Placement) -> Any:
    """Load the base where a placement says; says where it is not the whole one that answers."""
    if recipe.eval.backend == "vllm":
        return models.load_base(base, placement, context_length(load_config(base)))
    if placement.note:
        print(f"evaluation: {placement.note}", flush=True)
    with working("loading the base model"):
        return load_placed(base, recipe, placement)


def _load_tuned(live: Any, run: Run, recipe: Recipe, dtype: torch.dtype) -> Any:
    """Return the tuned model, with the adapter in the precision in which training multiplied it."""
    if isinstance(live, VllmModel):
        return models.load_tuned(live, run, context_length(live.config))
    tuned = load_delta(live, run.delta)
    recipe.method.adapter.match_precision(tuned, dtype)
    return tuned


def _weights(base: Base) -> dict[str, str]:
    """Return the SHA-256 of each file of the base's weights."""
    files = fingerprint_base(base)
    return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}


def _check_delta(delta: Path) -> None:
    """Raise ProofError for a delta whose values are not all finite: nothing that it answers could be scored."""
    for file in sorted(delta.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if not is_finite(stored.get_tensor(name)):
                    raise ProofError(f"{file}: {name} holds values that are not finite; train again at a lower rate")


def _check_logits(exam: Exam, model: Any, name: str) -> None:
    """Raise ProofError for a model whose logits are not finite numbers on the first question."""
    rows = exam.held_out.get(HELD_OUT)
    tokens = list(rows.prompt_ids[0]) if rows else exam.tokenizer(_PROBE).input_ids
    refuse_broken(model, tokens[-context_length(model.config) :], name)


def _write(run: Run, stored: Evaluations) -> None:
    """Replace what eval/ holds by the files of this evaluation, all of them at once."""
    with write_folder(run.eval) as folder:
        for name, value in stored.items():
            write_json(folder / f"{name}.json", value)
