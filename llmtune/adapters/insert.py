"""Insert an adapter where a plan trains; save and load a delta: the adapter, or the tensors that trained."""

from typing import Any

from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.bottleneck import BottleneckConfig
from llmtune.adapters.lora import chosen_distances, lora_config
from llmtune.adapters.sections import AnyAdapter, Bottleneck, Ia3, Lora, NoAdapter
from llmtune.errors import FieldError, nearest
from llmtune.model.base import Base
from llmtune.model.blocks import blocks, distances
from llmtune.model.mlp import mlps, width_key
from llmtune.plan.stages import Plan


def insert(model: PreTrainedModel, spec: AnyAdapter, plan: Plan, base: Base) -> PreTrainedModel | PeftModel:
    """The model with an adapter in every block that the plan ever trains; the model itself without one."""
    if isinstance(spec, NoAdapter):
        return model
    if isinstance(spec, Lora):
        near = chosen_distances(spec, len(blocks(model)))
        config: Any = lora_config(model, spec, _targets(model, plan, spec.targets, near))
    elif isinstance(spec, Ia3):
        config = _ia3(model, plan, spec)
    else:
        config = _bottleneck(model, plan, spec)
    count_adapted = get_peft_model(model, config)
    # get_peft_model puts the folder's path in place of a name: a private path would be published.
    config.base_model_name_or_path = base.hub_id or base.name
    config.revision = base.revision if base.hub_id == base.name else None
    return count_adapted


def _ia3(model: PreTrainedModel, plan: Plan, spec: Ia3) -> IA3Config:
    kind = model.config.model_type
    known = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    if spec.targets == "auto" and known is None:
        raise FieldError("method.adapter.targets", f"PEFT knows no IA3 targets for {kind}; list module names")
    inside = [pair for block in blocks(model) for pair in block.named_modules()]
    names = {name.rsplit(".", 1)[-1] for name, module in inside if isinstance(module, nn.Linear | Conv1D)}
    missing = [name for name in known or () if spec.targets == "auto" and name.rsplit(".", 1)[-1] not in names]
    if missing:
        said = f"auto means {', '.join(known or ())} for {kind}, and this model has no linear layer {missing[0]}"
        raise FieldError("method.adapter.targets", f"{said}; list module names: {', '.join(sorted(names))}")
    targets = _targets(model, plan, tuple(known or ()) if spec.targets == "auto" else spec.targets)
    ends = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    feedforward = [name for name in targets if name.endswith(tuple(ends))] if ends else []
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward)


def _bottleneck(model: PreTrainedModel, plan: Plan, spec: Bottleneck) -> BottleneckConfig:
    trained = set(_targets(model, plan, "all-linear"))
    names = {id(module): name for name, module in model.named_modules()}
    try:
        found = mlps(model)
        if spec.form == "parallel":
            width_key(model, found[0].width)
    except ValueError as error:
        raise FieldError("method.adapter.kind", str(error)) from error
    targets = [mlp.name for mlp in found if names[id(mlp.down)] in trained]
    size = spec.size or max(1, model.config.get_text_config().hidden_size // 16)
    return BottleneckConfig(task_type="CAUSAL_LM", size=size, form=spec.form, target_modules=targets)


def _targets(
    model: PreTrainedModel, plan: Plan, wanted: str | tuple[str, ...], near: set[int] | None = None
) -> list[str]:
    """Full names of the linear layers to adapt, in blocks that the plan ever trains; every wanted name must match."""
    modules = dict(model.named_modules())
    distance = distances(model)
    inside = {id(module) for block in blocks(model) for module in block.modules()}
    linear = [name for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and id(m) in inside]
    far = {name: distance[f"{name}.weight"] for name in linear}
    reached = [name for name in linear if plan.peak(far[name]) > 0]
    if not reached:
        raise FieldError("method.reach", "reaches no block, so no adapter would train; the nearest valid reach is 1")
    trained = [name for name in reached if near is None or far[name] in near]
    if not trained:
        said = f"names no block that trains; the plan reaches distance {max(far[name] for name in reached)}"
        raise FieldError("method.adapter.layers", said)
    if isinstance(wanted, str):
        return trained
    ends = sorted({name.rsplit(".", 1)[-1] for name in trained})
    for target in wanted:
        if not any(_called(name, target) for name in trained):
            raise FieldError("method.adapter.targets", _no_match(target, modules, ends))
    return [name for name in trained if any(_called(name, target) for target in wanted)]


def _called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _no_match(target: str, modules: dict[str, nn.Module], ends: list[str]) -> str:
    """What a target is that is no linear layer that trains, and the nearest that is one."""
    others = [module for name, module in modules.items() if _called(name, target)]
    hint = nearest(target, ends) or f"; this model has {', '.join(ends)}"
    if others and not isinstance(others[0], nn.Linear | Conv1D):
        return f"{target!r} is a {type(others[0]).__name__}, and adapters go to linear layers{hint}"
    if others and target == "lm_head":
        return f"{target!r} is the head, which adapters leave alone; it trains without an adapter, where it is untied"
    return f"{target!r} matches no linear layer that trains{hint}"


def count_adapted(model: nn.Module) -> dict[str, int]:
    """How many layers of each name carry an adapter."""
    names = [name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def trained_tensors(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The parameters that ever train under a plan, by name; with an adapter, the adapter's alone."""
    distance = distances(model)
    own = (
        (lambda name: model.get_parameter(name).requires_grad) if isinstance(model, PeftModel) else (lambda name: True)
    )
    return {name: p for name, p in model.named_parameters() if plan.peak(distance[name]) > 0 and own(name)}
