"""The plan table: what trains when, at which rate, from a model without weights."""

import math
from dataclasses import asdict
from typing import Any

from llmtune.adapters.insert import count_adapted, insert, trained_tensors
from llmtune.errors import FieldError
from llmtune.frozen.boundary import boundaries
from llmtune.frozen.stream import count_offloaded
from llmtune.model.base import Base, build_skeleton, computes_bf16, model_facts
from llmtune.model.blocks import distances
from llmtune.model.quantize import count_quantized
from llmtune.plan.schedule import Schedule
from llmtune.plan.stages import Facts, Plan
from llmtune.recipe.sections import Recipe
from llmtune.train.distributed import check_sharded, check_stages


def split_batch(recipe: Recipe, world: int) -> tuple[int, int]:
    """Rows per forward pass and passes per optimizer step; raises RecipeError where batch_size is no multiple."""
    share, rest = divmod(recipe.train.batch_size, world)
    if rest or not share:
        nearest = max(1, round(recipe.train.batch_size / world)) * world
        raise FieldError("train.batch_size", f"is no multiple of {world} processes; the nearest valid is {nearest}")
    size = recipe.train.micro_batch_size or max(size for size in range(1, min(8, share) + 1) if share % size == 0)
    if share % size:
        raise FieldError("train.micro_batch_size", f"{size} does not divide {share}, the rows per step and process")
    return size, share // size


def total_steps(recipe: Recipe, rows: int, world: int) -> int:
    """Optimizer steps of a run over that many training rows."""
    size, passes = split_batch(recipe, world)
    per_epoch = max(1, math.ceil(math.ceil(rows / world / size) / passes))
    steps = math.ceil(recipe.train.epochs * per_epoch)
    return min(steps, recipe.train.max_steps or steps)


def lay_out(recipe: Recipe, plan: Plan, steps: int) -> Schedule:
    """The plan laid over the steps with the recipe's warm-up and shape; raises RecipeError where they are too few."""
    try:
        return Schedule(plan, steps, recipe.train.warmup, recipe.train.schedule)
    except ValueError as error:
        raise FieldError("train.epochs", str(error)) from error


def plan_table(recipe: Recipe, base: Base, steps: int) -> dict[str, Any]:
    """What trains when and at which rate, from a model without weights; raises RecipeError for what cannot be."""
    skeleton = build_skeleton(base)
    facts = model_facts(skeleton)
    plan = recipe.plan(facts)
    adapter = recipe.method.adapter
    quantized = count_quantized(skeleton, plan, not adapter.trains_base) if recipe.model.quantize != "none" else 0
    tuned = insert(skeleton, adapter, plan, base)
    tensors = trained_tensors(tuned, plan)
    if not tensors:
        raise FieldError("method", "nothing would train: this reach and adapter have no tensor in common")
    _refuse(recipe, plan)
    distance = distances(tuned)
    laid = lay_out(recipe, plan, steps)
    ends = [*laid.starts[1:], steps]
    stages = []
    for stage, start, end in zip(plan.stages, laid.starts, ends, strict=True):
        live = {name: tensor for name, tensor in tensors.items() if stage.rate(distance[name]) > 0}
        if not live:
            raise FieldError(
                "method", f"the stage that ends at {stage.until:.2g} trains nothing: no tensor is within its reach"
            )
        counts: dict[int, list[int]] = {}
        for name, tensor in live.items():
            counts.setdefault(distance[name], []).append(tensor.numel())
        near = sorted(counts)
        stages.append(
            {
                "start": start,
                "end": end,
                **asdict(stage),
                "rates": {str(d): stage.rate(d) for d in near},
                "tensors": {str(d): len(counts[d]) for d in near},
                "parameters": {str(d): sum(counts[d]) for d in near},
                "trained": sum(map(sum, counts.values())),
            }
        )
    left = count_offloaded(recipe, tuned, boundaries(plan, {name: distance[name] for name in tensors}, facts.blocks))
    trained = sum(tensor.numel() for tensor in tensors.values())
    return {
        "base": {"name": base.name, "revision": base.revision, "hub_id": base.hub_id},
        "method": recipe.method.kind,
        "adapter": adapter.kind,
        "blocks": facts.blocks,
        "parameters": facts.parameters,
        "trained": trained,
        "adapted": count_adapted(tuned),
        "quantized": quantized,
        "delta_bytes": 4 * adapter.count_stored(tuned, tensors),
        "states_bytes": states_bytes(recipe, facts.parameters - left, trained),
        "frozen_blocks": frozen_blocks_table(recipe, plan, {name: distance[name] for name in tensors}, facts),
        "steps": steps,
        "stages": stages,
        "notes": adapter.rate_notes(max(stage.lr for stage in plan.stages)) + _tied_note(skeleton, plan),
    }


def frozen_blocks_table(recipe: Recipe, plan: Plan, distance: dict[str, int], facts: Facts) -> dict[str, Any]:
    """The boundaries whose states may be kept, and bytes per token for all of them; `distance` is what trains'."""
    found = (
        sorted(set(boundaries(plan, distance, facts.blocks)) - {0})
        if recipe.memory.frozen_blocks != "recompute"
        else []
    )
    wide = max(distance.values()) > facts.blocks or not computes_bf16(recipe.model.precision)
    return {"boundaries": found, "bytes_per_token": len(found) * facts.hidden * (4 if wide else 2)}


def _tied_note(skeleton: Any, plan: Plan) -> list[str]:
    """A line on a head that is the embeddings' matrix, where a stage trains neither."""
    embedding, head = skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings().weight
    if embedding is not head or all(stage.reach is None for stage in plan.stages):
        return []
    said = "the head is the embeddings' matrix and trains with it: a stage that stops below them"
    return [f"{said} trains the final norm alone at distance 0"]


def states_bytes(recipe: Recipe, parameters: int, trained: int) -> int:
    """Bytes of weights, gradients and AdamW state: 16 per trained parameter, 2 (4bit: 0.52) per frozen one."""
    frozen = parameters - trained if recipe.method.adapter.trains_base else parameters
    return round(16 * trained + (0.52 if recipe.model.quantize == "4bit" else 2) * frozen)


def _refuse(recipe: Recipe, plan: Plan) -> None:
    adapter = recipe.method.adapter
    if recipe.model.quantize == "4bit" and adapter.unquantizable:
        raise adapter.unquantizable
    if recipe.merge.enabled and adapter.unmergeable:
        raise adapter.unmergeable
    if recipe.launch.accelerate == "fsdp2":
        check_sharded(recipe)
    if recipe.launch.accelerate in ("zero2", "zero3"):
        check_stages(recipe, plan)
