"""The plan table: what trains when, at which rate, from a model without weights."""

import copy
import math

import torch
from transformers import PreTrainedModel

from llmtune.adapters.insert import count_adapted, insert, trained_tensors
from llmtune.adapters.targets.coverage import notes_on_adapted, notes_on_rest
from llmtune.errors import FieldError, PlanError
from llmtune.estimate.memory import fixed_bytes
from llmtune.estimate.passes import setting_of
from llmtune.frozen.stream import check_offloaded
from llmtune.launch.command import read_config
from llmtune.launch.devices import launch_device, uses_cpu
from llmtune.launch.engine import check_config
from llmtune.machine.device import run_device
from llmtune.machine.precision import computing_dtype
from llmtune.model.base import Base, load_config, model_facts
from llmtune.model.blocks import distances
from llmtune.model.files.quantization import dequantized_format, kept_bits
from llmtune.model.layout import Layout
from llmtune.model.quantize import bits_of, check_quantized, split_linear_layers
from llmtune.plan.schedule import Schedule
from llmtune.plan.stages import Plan
from llmtune.plan.table import BaseName, CacheSize, PlanTable, StageRow
from llmtune.recipe.sections import Recipe, Train
from llmtune.tracking.kinds import check_installed
from llmtune.training.bases.find import check_layout, rest_size, start_note
from llmtune.training.selection.best import check_selection


def rows_per_process(train: Train, world: int) -> int:
    """Rows of an optimizer step for each process; raises FieldError where batch_size is no multiple."""
    share, rest = divmod(train.batch_size, world)
    if rest or not share:
        nearest = max(1, round(train.batch_size / world)) * world
        raise FieldError("train.batch_size", f"{train.batch_size} is not divisible by {world} processes; try {nearest}")
    if train.micro_batch_size and share % train.micro_batch_size:
        message = f"{train.micro_batch_size} does not divide {share}, the rows per step and process"
        raise FieldError("train.micro_batch_size", message)
    return share


def total_steps(train: Train, rows: int, world: int) -> int:
    """Optimizer steps of a run over that many training rows: max_steps where it is given, else what epochs says."""
    return train.max_steps or math.ceil(train.epochs * steps_per_epoch(train, rows, world))


def steps_per_epoch(train: Train, rows: int, world: int) -> int:
    """Optimizer steps in which every training row is seen once."""
    return max(1, math.ceil(rows / (rows_per_process(train, world) * world)))


def steps_note(train: Train, rows: int, world: int) -> list[str]:
    """A line on how often max_steps, where it is given, passes over the training rows."""
    per_epoch = steps_per_epoch(train, rows, world)
    if train.max_steps is None:
        return []
    if train.max_steps < per_epoch:
        seen = min(rows, train.max_steps * train.batch_size)
        return [f"train.max_steps {train.max_steps:,} ends within the first epoch: {seen:,} of {rows:,} rows are seen"]
    passes = f"{train.max_steps / per_epoch:.4g} passes over the rows"
    return [f"train.max_steps {train.max_steps:,} decides: {passes}, whatever train.epochs says"]


def lay_out(train: Train, plan: Plan, steps: int) -> Schedule:
    """The plan laid over the steps with the section's warm-up and shape; raises FieldError where they are too few."""
    try:
        return Schedule(plan, steps, train.warmup, train.schedule, train.seed, train.schedule_over)
    except ValueError as error:
        raise FieldError("train.max_steps" if train.max_steps else "train.epochs", str(error)) from error


def build_layout(recipe: Recipe, base: Base, skeleton: PreTrainedModel) -> Layout:
    """The recipe's plan laid over a model without weights; raises FieldError for a plan that it cannot follow."""
    facts, adapter = model_facts(skeleton), recipe.method.adapter
    plan = recipe.plan(facts)
    linear: tuple[list[str], list[str]] = ([], [])
    bits = bits_of(recipe.model.quantize) or kept_bits(skeleton.config)
    if bits:
        linear = split_linear_layers(skeleton, plan, adapted=not adapter.trains_base)
        check_quantized(linear[0], recipe.model.quantize)
    # An adapter starts from the random state, and takes the same start when it is trained; a plan takes no memory.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        tuned = insert(copy.deepcopy(skeleton), adapter, plan, base)
    trained, distance = trained_tensors(tuned, plan), distances(tuned)
    if not trained:
        raise FieldError("method", "nothing would train: this reach and adapter have no tensor in common")
    try:
        limited = plan.limited_to({distance[name] for name in trained})
    except PlanError as error:
        raise FieldError(f"method.{error.key}", str(error)) from error
    return Layout(facts, limited, skeleton, tuned, distance, trained, linear, bits)


def plan_table(recipe: Recipe, base: Base, layout: Layout, rows: int, world: int) -> PlanTable:
    """What trains when and at which rate, over that many rows and processes; raises FieldError for what cannot be."""
    _refuse(recipe, layout.bits)
    steps = total_steps(recipe.train, rows, world)
    schedule = lay_out(recipe.train, layout.plan, steps)
    stages = stage_rows(schedule, layout)
    check_offloaded(recipe, layout)
    check_layout(recipe, layout)
    adapter = recipe.method.adapter
    return PlanTable(
        base=BaseName(base.name, base.revision, base.hub_id),
        method=recipe.method.kind,
        adapter=adapter.kind,
        blocks=layout.facts.blocks,
        parameters=layout.facts.parameters,
        trained=count_trained(schedule, layout),
        adapted=count_adapted(layout.tuned),
        quantized=len(layout.linear[0]),
        delta_bytes=4 * (adapter.count_stored(layout.tuned, layout.trained) + rest_size(recipe, layout)),
        states_bytes=fixed_bytes(layout, setting_of(recipe, world, run_device().type)),
        frozen_blocks=cache_size(recipe, layout),
        steps=steps,
        stages=stages,
        notes=[
            *_converted_note(base),
            *_stored_note(base),
            *start_note(recipe),
            *check_selection(recipe),
            *steps_note(recipe.train, rows, world),
            *adapter.rate_notes(max(stage.lr for stage in layout.plan.stages)),
            *_tied_note(layout),
            *notes_on_rest(layout.skeleton),
            *_adapter_notes(recipe, layout),
            *_draw_note(schedule, layout),
            *_restart_note(recipe.train, schedule),
        ],
        in_words=recipe.method_words,
        bits=layout.bits,
    )


def count_trained(schedule: Schedule, layout: Layout) -> int:
    """How many parameters train at some step; blocks that are never drawn do not."""
    ever = {distance for distance in set(layout.trained_distance.values()) if schedule.ever_trains(distance)}
    return sum(layout.trained[name].numel() for name, distance in layout.trained_distance.items() if distance in ever)


def stage_rows(schedule: Schedule, layout: Layout) -> list[StageRow]:
    """One row a stage; raises FieldError for a stage without a tensor to train."""
    rows = []
    for stage, start, end in zip(schedule.plan.stages, schedule.starts, schedule.ends, strict=True):
        sizes: dict[int, list[int]] = {}
        for name, distance in layout.trained_distance.items():
            if distance in stage.trains:
                sizes.setdefault(distance, []).append(layout.trained[name].numel())
        if not sizes:
            message = f"the stage that ends at {stage.until:.2g} trains nothing: no tensor is within its reach"
            raise FieldError("method", message)
        near_first = sorted(sizes)
        row = StageRow(
            start,
            end,
            stage.until,
            stage.trains,
            stage.lr,
            stage.decay,
            rates={distance: stage.rate(distance) for distance in near_first},
            tensors={distance: len(sizes[distance]) for distance in near_first},
            parameters={distance: sum(sizes[distance]) for distance in near_first},
        )
        rows.append(row)
    return rows


def cache_size(recipe: Recipe, layout: Layout) -> CacheSize:
    """The boundaries below which outputs may be cached, and bytes per token for all of them."""
    caches = recipe.memory.frozen_blocks != "recompute"
    useful = sorted(set(layout.boundaries) - {0}) if caches else []
    trains_embeddings = max(layout.trained_distance.values()) > layout.facts.blocks
    dtype = computing_dtype(recipe.model.precision, launch_device(recipe.launch))
    wide = trains_embeddings or dtype is torch.float32
    return CacheSize(useful, len(useful) * layout.facts.hidden * (4 if wide else 2))


def _converted_note(base: Base) -> list[str]:
    """A line on a base that is a quantized copy of another model."""
    if not (base.converted and base.converted.quantized):
        return []
    of = f" of {base.hub_id}" if base.hub_id else ""
    return [f"the base is {base.converted.words}: a quantized copy{of}, not its 16-bit weights"]


def _stored_note(base: Base) -> list[str]:
    """A line on a base whose weights are not in 16 or 32 bits in its files."""
    config = load_config(base)
    if form := dequantized_format(config):
        return [f"the base is stored in {form}: it is dequantized to bf16 as it is loaded, and that is what trains"]
    if bits := kept_bits(config):
        return [f"the base is stored in {bits} bits: it stays in them, and the adapter alone trains"]
    return []


def _tied_note(layout: Layout) -> list[str]:
    """A line on a head that is the embeddings' matrix, where a stage trains neither."""
    embeddings = layout.facts.blocks + 1
    if not layout.tied or all(embeddings in stage.trains for stage in layout.plan.stages):
        return []
    message = "the head is the embeddings' matrix and trains with it: a stage that stops below them"
    return [f"{message} trains the final norm alone at distance 0"]


def _adapter_notes(recipe: Recipe, layout: Layout) -> list[str]:
    """Lines on the layers that an adapter leaves as they are."""
    adapter = recipe.method.adapter
    return [] if adapter.trains_base else notes_on_adapted(layout.skeleton, layout.tuned, adapter.takes_all)


def _draw_note(schedule: Schedule, layout: Layout) -> list[str]:
    """A line on how many blocks are ever drawn, and that none of them counts as frozen."""
    if not layout.plan.redrawn:
        return []
    drawn = sum(schedule.ever_trains(distance) for distance in range(1, layout.facts.blocks + 1))
    message = f"{drawn} of {layout.facts.blocks} blocks are drawn at some time in {schedule.steps:,} steps"
    return [f"{message}; outputs of blocks that may be drawn are not cached"]


def _restart_note(train: Train, schedule: Schedule) -> list[str]:
    """A line on a schedule that starts anew with each stage."""
    if schedule.over == "run" or len(schedule.starts) == 1:
        return []
    return [f"warm-up and train.schedule: {train.schedule} start anew with each of {len(schedule.starts)} stages"]


def _refuse(recipe: Recipe, bits: int | None) -> None:
    adapter = recipe.method.adapter
    check_installed(recipe.track)
    if bits and adapter.unquantizable:
        raise adapter.unquantizable
    if recipe.merge.enabled and adapter.unmergeable:
        raise adapter.unmergeable
    if recipe.launch.accelerate != "auto":
        config = read_config(recipe.launch.accelerate)
        check_config(config, recipe.train.optimizer)
        if bits == 8 and config["distributed_type"] == "FSDP":
            raise FieldError("launch.accelerate", "weights in 8 bits cannot be sharded; try ddp, or a base in 4 bits")
    if recipe.model.precision == "fp16" and uses_cpu(recipe.launch):
        message = f"fp16 is for GPUs, and launch.accelerate: {recipe.launch.accelerate} uses none; try auto"
        raise FieldError("model.precision", message)
