"""train(run): the one function that trains; started by `accelerate launch -m llmtune.train RUN`."""

from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, set_seed

from llmtune.adapters.delta import save_delta
from llmtune.adapters.insert import insert
from llmtune.adapters.lora import INITIAL, move_weight_into_adapter
from llmtune.data.collate import Collator
from llmtune.data.gate import gate
from llmtune.errors import Interrupted, RecipeError
from llmtune.files import read_json, write_json
from llmtune.frozen.cache import CachePolicy, FrozenBlocks
from llmtune.frozen.stream import OffloadedBlocks, load_offloaded
from llmtune.memory import bound_primitive_cache, keep_freed
from llmtune.model.base import (
    Base,
    cache_folder,
    computes_bf16,
    load_model,
    load_tokenizer,
    locate_base,
    stop_ids,
    weights_digest,
)
from llmtune.model.layout import Layout
from llmtune.model.quantize import load_quantized
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, locates_mistakes
from llmtune.terminal import heading
from llmtune.train.arguments import ARGUMENTS, resolved_arguments, to_dataset, training_arguments
from llmtune.train.checkpoint import complete_checkpoints
from llmtune.train.distributed import check_engine, check_world
from llmtune.train.plan_table import build_layout, lay_out, total_steps
from llmtune.train.planned import PlannedTrainer
from llmtune.train.prepare import Prepared
from llmtune.train.progress import Progress, step_recorder
from llmtune.train.proof import checksums, prove_planned_changes
from llmtune.train.stop import Stop


@locates_mistakes
def train(run: Run, found: Prepared | None = None) -> None:
    """Train what the run's recipe says, from its newest complete checkpoint where there is one, and leave the delta.

    `found` is what this process found out when it prepared the run.
    """
    settings = run.recipe()
    state = PartialState(cpu=not torch.cuda.is_available())
    check_world(settings, state)
    if state.device.type == "cpu":
        bound_primitive_cache()
        if settings.memory.frozen_blocks != "stream":
            keep_freed()
    set_seed(settings.train.seed)
    base = found.base if found else locate_base(settings.model)
    tokenizer = load_tokenizer(base)
    data = found.data if found else gate(settings, tokenizer, stop_ids(base))
    check_same_data(run, data.findings)
    layout = found.layout if found else build_layout(settings, base)
    plan = layout.plan
    check_engine(settings, plan, state)
    dtype = torch.bfloat16 if computes_bf16(settings.model.precision) else torch.float32
    loaded, shelf = _load(base, settings, layout, dtype)
    tuned = insert(loaded, settings.method.adapter, plan, base)
    tensors = {name: tuned.get_parameter(name) for name in layout.trained}
    steps = total_steps(settings, len(data.train), state.num_processes)
    laid = lay_out(settings, plan, steps)
    done = complete_checkpoints(run.checkpoints)
    with state.main_process_first():
        move_weight_into_adapter(tuned, settings.method.adapter, run.checkpoints / INITIAL, bool(done), state.device)
    start = int(done[-1].name.removeprefix("step-")) if done else 0
    progress = Progress(steps, None, run.log_file, start_step=start, stage_starts=laid.starts, rank=state.process_index)
    stop, record = Stop(), step_recorder(progress)
    if state.is_main_process:
        heading("train")
    with progress:
        trainer = PlannedTrainer(
            tuned,
            make_schedule=lambda count: lay_out(settings, plan, count),
            tensors=tensors,
            record=record,
            keep=settings.train.keep,
            frozen_blocks=_frozen_blocks(settings, base, [*data.train, *data.eval], shelf),
            grouped=settings.train.group_by_length,
            args=training_arguments(settings, run, plan, steps, state.num_processes, bool(data.eval)),
            train_dataset=to_dataset(data.train),
            eval_dataset=to_dataset(data.eval, len(data.train)) if data.eval else None,
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
        ever = [name for name in trainer.current_tensors() if laid.ever_trains(trainer.distance[name])]
        still = prove_planned_changes(before, trainer.model, ever, trainer.distance)
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


def _load(base: Base, settings: Recipe, layout: Layout, dtype: torch.dtype) -> tuple[Any, OffloadedBlocks | None]:
    """The base as the recipe wants it in memory, and where the blocks lie that it wants left on disk."""
    if settings.memory.frozen_blocks == "stream":
        return load_offloaded(base, settings, layout, dtype)
    if settings.model.quantize == "none":
        return load_model(base, dtype), None
    return load_quantized(base, layout.linear, dtype), None


def _frozen_blocks(
    settings: Recipe, base: Base, examples: list[Any], shelf: OffloadedBlocks | None
) -> FrozenBlocks | None:
    """What keeps the outputs of blocks that do not train, where the recipe allows it."""
    memory = settings.memory
    if memory.frozen_blocks == "recompute":
        return None
    facts = {
        "base": base.revision or weights_digest(base.folder),
        "quantize": settings.model.quantize,
        "bf16": computes_bf16(settings.model.precision),
    }
    adapter = {**settings.method.adapter.model_dump(), "seed": settings.train.seed}
    may = CachePolicy(
        cache_folder() / "frozen-blocks",
        facts,
        None if adapter["kind"] == "none" else adapter,
        round(memory.cache_limit_gb * 2**30),
        memory.frozen_blocks == "cache",
        shelf,
    )
    return FrozenBlocks([example.input_ids for example in examples], may)


def check_same_data(run: Run, findings: dict[str, Any]) -> None:
    """Raise RecipeError where the data files changed since the run was made."""
    before, now = (
        {part: file.get("sha256") for part, file in found["files"].items()}
        for found in (read_json(run.data_file), findings)
    )
    if before != now:
        raise RecipeError(f"{run.path}: the data changed since this run was made; start a new one with --out")
