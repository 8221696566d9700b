"""train(run): the one function that trains; started by `accelerate launch -m llmtune.train RUN`."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, set_seed

from llmtune import engine, recipe
from llmtune import show as show_module
from llmtune.adapters.delta import save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.adapters.lora import INITIAL, move_weight_into_adapter
from llmtune.arguments import ARGUMENTS, arguments, dataset, resolved_arguments
from llmtune.checkpoint import checksums, complete_checkpoints
from llmtune.data.collate import Collator
from llmtune.data.gate import gate
from llmtune.errors import Interrupted, LlmtuneError, RecipeError, TrainingError
from llmtune.files import read_json, write_json
from llmtune.frozen.cache import CachePolicy, FrozenBlocks
from llmtune.frozen.stream import OffloadedBlocks, load_offloaded
from llmtune.launch.process import exit_process, report_failure
from llmtune.memory import bound_primitive_cache, keep_freed
from llmtune.model.base import (
    Base,
    build_skeleton,
    cache_folder,
    computes_bf16,
    load_tokenizer,
    locate_base,
    model_facts,
    stop_ids,
    weights_digest,
)
from llmtune.model.quantize import load_quantized
from llmtune.plan.stages import Plan
from llmtune.prepare import Prepared, prepared, schedule, total_steps
from llmtune.progress import Progress
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, open_run
from llmtune.show import heading
from llmtune.trainer import PlannedTrainer
from llmtune.watch import Stop, recorder


def train(run: Run, found: Prepared | None = None) -> None:
    """Train what the run's recipe says, from its newest complete checkpoint where there is one, and leave the delta.

    `found` is what this process found out when it prepared the run.
    """
    settings = run.recipe()
    state = PartialState(cpu=not torch.cuda.is_available())
    engine.check_world(settings, state)
    if state.device.type == "cpu":
        bound_primitive_cache()
        if settings.memory.prefix != "stream":
            keep_freed()
    set_seed(settings.train.seed)
    base = found.base if found else locate_base(settings)
    tokenizer = load_tokenizer(base)
    data = found.data if found else gate(settings, tokenizer, stop_ids(base))
    _same_data(run, data.findings)
    plan = settings.plan(model_facts(build_skeleton(base)))
    engine.check(settings, plan, state)
    dtype = torch.bfloat16 if computes_bf16(settings) else torch.float32
    loaded, shelf = _load(base, settings, plan, dtype)
    tuned = insert(loaded, settings, plan, base)
    tensors = trained_tensors(tuned, plan)
    steps = total_steps(settings, len(data.train), state.num_processes)
    laid = schedule(settings, plan, steps)
    done = complete_checkpoints(run.checkpoints)
    with state.main_process_first():
        move_weight_into_adapter(tuned, settings.method.adapter, run.checkpoints / INITIAL, bool(done), state.device)
    start = int(done[-1].name.removeprefix("step-")) if done else 0
    progress = Progress(steps, None, run.log_file, start_step=start, stage_starts=laid.starts, rank=state.process_index)
    stop, record = Stop(), recorder(progress)
    if state.is_main_process:
        heading("train")
    with progress:
        trainer = PlannedTrainer(
            tuned,
            make_schedule=lambda count: schedule(settings, plan, count),
            tensors=tensors,
            record=record,
            keep=settings.train.keep,
            prefix=_prefix(settings, base, [*data.train, *data.eval], shelf),
            grouped=settings.train.group_by_length,
            args=arguments(settings, run, plan, steps, state.num_processes, bool(data.eval)),
            train_dataset=dataset(data.train),
            eval_dataset=dataset(data.eval, len(data.train)) if data.eval else None,
            data_collator=Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
            callbacks=[stop],
        )
        trainer.remove_callback(PrinterCallback)
        if state.is_main_process:
            write_json(run.path / ARGUMENTS, resolved_arguments(trainer.args))
        before = checksums(dict(tuned.named_parameters()))
        trained = sum(tensor.numel() for tensor in tensors.values())
        del tensors  # whole weights, which sharding replaces
        trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
        reached = trainer.state.global_step
        if stop.asked and reached < steps:
            raise Interrupted(f"stopped at step {reached} of {steps}, with a checkpoint; go on: llmtune run {run.path}")
        still = _prove(before, trainer)
        if still:
            said = f"warning: never changed, though to be trained: {still[0]}"
            said += f" and {len(still) - 1} more" if still[1:] else ""
            record({"step": reached, "warning": said})
    delta = trainer.trained_state()
    if state.is_main_process:
        save_delta(tuned, delta, run.delta, base, settings.method.adapter.kind)
        run.mark("train", [run.delta], steps=steps, trained=trained)
    state.wait_for_everyone()
    state.destroy_process_group()


def _load(base: Base, settings: Recipe, plan: Plan, dtype: torch.dtype) -> tuple[Any, OffloadedBlocks | None]:
    """The base as the recipe wants it in memory, and where the blocks lie that it wants left on disk."""
    if settings.memory.prefix == "stream":
        return load_offloaded(base, settings, plan, dtype)
    return load_quantized(base, settings, plan, dtype), None


def _prefix(settings: Recipe, base: Base, examples: list[Any], shelf: OffloadedBlocks | None) -> FrozenBlocks | None:
    """What keeps the outputs of blocks that do not train, where the recipe allows it."""
    memory = settings.memory
    if memory.prefix == "none":
        return None
    facts = {
        "base": base.revision or weights_digest(base.folder),
        "quantize": settings.model.quantize,
        "bf16": computes_bf16(settings),
    }
    adapter = {**settings.method.adapter.model_dump(), "seed": settings.train.seed}
    may = CachePolicy(
        cache_folder() / "prefix",
        facts,
        None if adapter["kind"] == "none" else adapter,
        round(memory.prefix_limit_gb * 2**30),
        memory.prefix == "keep",
        shelf,
    )
    return FrozenBlocks([example.input_ids for example in examples], may)


def _same_data(run: Run, findings: dict[str, Any]) -> None:
    """Raise RecipeError where the data files changed since the run was made."""
    before, now = (
        {part: file.get("sha256") for part, file in found["files"].items()}
        for found in (read_json(run.data_file), findings)
    )
    if before != now:
        raise RecipeError(f"{run.path}: the data changed since this run was made; start a new one with --out")


def _prove(before: dict[str, int], trainer: PlannedTrainer) -> list[str]:
    """What should have moved since `before` and did not.

    Raises TrainingError where something frozen moved, or where nothing at some distance did.
    """
    # What is empty was let go and cannot have trained.
    live = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.numel()}
    after, trained = checksums(live), trainer.current_tensors()
    changed = {name for name in after if before[name] != after[name]}
    moved = sorted(changed - set(trained))
    if moved:
        raise TrainingError(f"{moved[0]} should have stayed frozen but changed")
    distance = trainer.distance
    still = {distance[name] for name in trained} - {distance[name] for name in changed}
    if still:
        raise TrainingError(f"nothing at distance {min(still)} changed, so it was not trained")
    return sorted(set(trained) - changed)


def main(words: list[str]) -> int:
    """Train the run folder, or the recipe, that the words of a command line name; gives the exit code."""
    options = _parser().parse_args(words)
    try:
        if options.recipe.is_dir():
            train(open_run(options.recipe))
        else:
            _train_recipe(options)
    except LlmtuneError as error:
        return report_failure(error)
    except KeyboardInterrupt:
        return Interrupted.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="accelerate launch --config_file FILE -m llmtune.train")
    parser.add_argument("recipe", type=Path, metavar="RECIPE|RUN")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a value of the recipe")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/<recipe's name>)")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that the folder holds")
    return parser


def _train_recipe(options: argparse.Namespace) -> None:
    """Train the run that the first process on each machine makes of a recipe, unless it is trained already."""
    state = PartialState(cpu=not torch.cuda.is_available())
    out, found = options.out or Path("runs") / options.recipe.stem, None
    with state.local_main_process_first():
        if state.is_local_main_process:
            settings = recipe.load(options.recipe, options.set)
            found = prepared(settings, out, torch.cuda.device_count(), options.overwrite)
    made = open_run(out)
    if state.is_main_process:
        show_module.prepared(made)
    if not made.done("train"):
        train(made, found)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
