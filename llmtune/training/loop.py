"""train(run): the one function that trains; started by `accelerate launch -m llmtune.train RUN`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from llmtune.adapters.delta import save_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.data.batches.collate import Collator
from llmtune.data.batches.rows import ExampleRows
from llmtune.data.findings import check_same_data
from llmtune.data.gate import gate
from llmtune.data.store.encoded import TokenIds
from llmtune.estimate.lengths import counted
from llmtune.estimate.measured import MemoryWatch, stage_peaks
from llmtune.files import cache_folder, write_json
from llmtune.frozen.cache import CachePolicy, FrozenBlocks
from llmtune.frozen.stream import OffloadedBlocks, load_offloaded
from llmtune.machine import processes
from llmtune.machine.memory import bound_primitive_cache, keep_freed
from llmtune.machine.precision import computing_dtype
from llmtune.model.base import Base, load_model
from llmtune.model.files.fingerprints import weights_digest
from llmtune.model.files.locate import locate_base
from llmtune.model.layout import Layout
from llmtune.model.quantize import load_quantized
from llmtune.model.sharded import is_sharded_run
from llmtune.model.tokens import load_tokenizer, model_limits, stop_ids
from llmtune.plan.schedule import Schedule
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, locates_mistakes
from llmtune.terminal import heading
from llmtune.timing.seconds import Work
from llmtune.tracking.hardware import HardwareRecorder
from llmtune.tracking.tracking import tracked
from llmtune.training.arguments import ARGUMENTS, resolved_arguments, training_arguments
from llmtune.training.bases.base import bind_base, check_model
from llmtune.training.bases.find import load_found_start, start_note
from llmtune.training.bases.start import Start, add_rest
from llmtune.training.checkpoint import checkpoint_step, complete_checkpoints
from llmtune.training.distributed import check_engine, check_world, describe_cards, deterministic, join_processes
from llmtune.training.objective import SupervisedTrainer
from llmtune.training.passes.choice import RunPasses, choose_passes, record_start
from llmtune.training.passes.time import predict_seconds
from llmtune.training.plan_table import build_layout, count_trained, lay_out, total_steps
from llmtune.training.prepare import Prepared
from llmtune.training.progress import Progress, step_recorder
from llmtune.training.proof import warn_of_unchanged
from llmtune.training.selection.answers import answer_score
from llmtune.training.selection.best import SCORE, Choice, best_checkpoint, measure_of, tensors_of
from llmtune.training.stop import Stop
from llmtune.working import working


@locates_mistakes
def train(
    run: Run, prepared: Prepared | None = None, callbacks: Sequence[TrainerCallback] = (), keeps: bool = True
) -> None:
    """Train what the run's recipe says, from its newest complete checkpoint where there is one, and leave the delta.

    `prepared` spares what this process did when it prepared the run; `callbacks` watch the training. Without `keeps`
    no delta is left: a trial, whose callbacks say what is saved.
    """
    recipe = run.recipe()
    state = join_processes()
    check_world(recipe, state)
    with deterministic(recipe.train.deterministic):
        _train(run, recipe, state, prepared, callbacks, keeps)


def _train(
    run: Run,
    recipe: Recipe,
    state: PartialState,
    prepared: Prepared | None,
    callbacks: Sequence[TrainerCallback],
    keeps: bool,
) -> None:
    card_lines = describe_cards(recipe, state)  # now: what the base takes is not in use by others
    if state.device.type == "cpu":
        bound_primitive_cache()
        if recipe.memory.frozen_blocks != "stream":  # which gives the memory of its blocks back
            keep_freed()
    set_seed(recipe.train.seed)
    watch = MemoryWatch(state.device)
    base = prepared.base if prepared else locate_base(recipe.model)
    layout = prepared.layout if prepared else _check_again(run, recipe, base, state)
    tokenizer, ends = load_tokenizer(base), stop_ids(base)
    data = prepared.data if prepared else gate(recipe, tokenizer, ends, model_limits(layout.skeleton))
    check_same_data(run, data.findings)
    plan = layout.plan
    check_engine(recipe, state)
    dtype = computing_dtype(recipe.model.precision, state.device)
    with working("checking the checkpoints"):
        done = complete_checkpoints(run.checkpoints)
    lengths = counted(data.train)
    passes = choose_passes(recipe, layout, state, lengths.longest, done[-1] if done else None)
    seconds = predict_seconds(run, recipe, layout, state, Work(lengths, len(data.eval)), passes)
    with working("loading the base model"):
        weights, offloaded = _load(base, recipe, layout, dtype, state.device)
        model = insert(weights, recipe.method.adapter, plan, base)
    # Not the layout's: a head that the files store apart from its embedding is a parameter of the loaded model alone.
    tensors = trained_tensors(model, plan)
    start = load_found_start(recipe, model, tensors)
    steps = total_steps(recipe.train, len(data.train), state.num_processes)
    schedule = lay_out(recipe.train, plan, steps)
    recipe.method.adapter.move_weight(model, run.checkpoints, bool(done), state.device)
    progress = _progress(run, schedule, done, state.process_index)
    stop, record = Stop(), step_recorder(progress, watch, seconds)
    best = best_checkpoint(recipe, schedule.starts[-1])
    if state.is_main_process:
        heading("train")
    rows = TokenIds(data.train, data.eval)
    rows_to_validate = passes.rows_to_validate(recipe.train, state.num_processes, data.eval)
    with progress, tracked(run, progress.start_step, record, state.is_main_process) as progress.also:
        record_start(record, progress.start_step, [*card_lines, *start_note(recipe)], data.findings["sources"], passes)
        trainer = SupervisedTrainer(
            model,
            make_schedule=lambda count: lay_out(recipe.train, plan, count),
            tensors=tensors,
            record=record,
            keep=recipe.train.keep,
            frozen_blocks=_frozen_blocks(recipe, base, layout, rows, offloaded, dtype, start),
            grouped=recipe.train.group_by_length,
            limits=passes.limits,
            copies=passes.copies,
            args=training_arguments(recipe, run, steps, state.num_processes, passes, rows_to_validate),
            train_dataset=ExampleRows(data.train),
            eval_dataset=ExampleRows(data.eval, len(data.train)) if data.eval else None,
            data_collator=Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
            answers=answer_score(recipe, data.eval, data.rows.get("eval", ()), tokenizer, ends, state),
            callbacks=[stop, HardwareRecorder(record, state.device), *([best] if best else []), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        watch.expect(_predicted(recipe, layout, state, lengths.longest, passes), schedule.ends)
        if state.is_main_process:
            write_json(run.path / ARGUMENTS, resolved_arguments(trainer.args, passes))
        del tensors  # whole weights, which sharding replaces
        trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
        reached = trainer.state.global_step
        stop.check(reached, steps, run.path)
        if keeps:
            warn_of_unchanged(trainer.prove_changes(), reached, record)
        choice = best.choose(trainer.state, record) if best else None
    if keeps:
        _leave_delta(run, recipe, trainer, model, base, start, choice, count_trained(schedule, layout))
    state.destroy_process_group()


def _leave_delta(
    run: Run,
    recipe: Recipe,
    trainer: SupervisedTrainer,
    model: PreTrainedModel,
    base: Base,
    start: Start | None,
    choice: Choice | None,
    parameters: int,
) -> None:
    """Write the delta of the last step, or of the chosen one, with what its start trained; every process must ask."""
    with working("saving the trained weights"):
        last = trainer.trained_state()
        if trainer.is_world_process_zero():
            trained = tensors_of(run.checkpoints, choice, trainer.file_of(last) or last)
            whole = add_rest(trained, start) if start else trained
            save_delta(model, whole, run.delta, base, recipe.method.adapter.kind, start.facts() if start else None)
            best = {"best": choice.to_json()} if choice else {}
            run.mark("train", [run.delta], steps=trainer.state.global_step, trained=parameters, **best)
        processes.wait()


def _progress(run: Run, schedule: Schedule, done: list[Path], rank: int) -> Progress:
    """The display and the log of a training that goes on from the newest checkpoint."""
    start_step = checkpoint_step(done[-1]) if done else 0
    return Progress(schedule.steps, run.log_file, start_step=start_step, stage_starts=schedule.starts, rank=rank)


def _predicted(recipe: Recipe, layout: Layout, state: PartialState, longest: int, passes: RunPasses) -> list[int]:
    """Predicted bytes of each stage on one device, in the largest pass that there may be."""
    tokens = passes.largest(recipe.train, state.num_processes, longest)
    world, how = state.num_processes, (passes.checkpointing, passes.copies)
    return stage_peaks(recipe, layout, world, state.device, longest, tokens, *how)


def _check_again(run: Run, recipe: Recipe, base: Base, state: PartialState) -> Layout:
    """The plan laid over the base of a run that was prepared before; raises RecipeError for another base."""
    skeleton = check_model(recipe, base)
    # No barrier: a process that prepared the run does not come here, and the others would wait for it.
    bind_base(run, recipe, base, write=state.is_main_process)
    return build_layout(recipe, base, skeleton)


def _load(
    base: Base, recipe: Recipe, layout: Layout, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, OffloadedBlocks | None]:
    """The base as the recipe wants it in memory, straight on `device`, and the blocks that it leaves on disk."""
    if recipe.memory.frozen_blocks == "stream":
        return load_offloaded(base, layout, dtype)
    # What is sharded goes to a GPU block by block; without one, bitsandbytes chooses for 4 bits.
    to = None if device.type == "cpu" or is_sharded_run() else device
    if recipe.model.quantize == "none":
        return load_model(base, dtype, device=to), None
    return load_quantized(base, layout.linear, dtype, to, layout.bits or 4), None


def _frozen_blocks(
    recipe: Recipe,
    base: Base,
    layout: Layout,
    rows: Sequence[list[int]],
    offloaded: OffloadedBlocks | None,
    dtype: torch.dtype,
    start: Start | None,
) -> FrozenBlocks | None:
    """The cache of frozen blocks' outputs, where the recipe allows it and some blocks are frozen."""
    memory = recipe.memory
    # Answers in a validation need every block; the weights of cached ones are freed.
    if memory.frozen_blocks == "recompute" or measure_of(recipe) == SCORE or not any(layout.boundaries):
        return None
    facts: dict[str, object] = {
        "base": base.revision or _weights_digest(base),
        "quantize": recipe.model.quantize,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if start is not None:
        facts["start"] = start.facts()["sha256"]
    if base.added:
        facts["added"] = list(recipe.model.add_tokens)
    adapter = recipe.method.adapter
    policy = CachePolicy(
        cache_folder() / "frozen-blocks",
        facts,
        None if adapter.trains_base else {**adapter.model_dump(), "seed": recipe.train.seed},
        memory.cache_limit,
        memory.frozen_blocks == "cache",
        offloaded,
    )
    return FrozenBlocks(rows, policy)


def _weights_digest(base: Base) -> str:
    """The digest of a folder's weights, which the first process on each machine reads; every process must ask."""
    answers = processes.gather(weights_digest(base) if processes.is_first_here() else None)
    return next(digest for digest in answers if digest)
