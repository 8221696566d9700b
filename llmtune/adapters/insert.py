"""Insert an adapter where a plan trains, and name the tensors that ever train."""

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from llmtune.adapters.base import AdapterSpec
from llmtune.errors import FieldError, first_line
from llmtune.model.base import Base
from llmtune.model.blocks import blocks, distances, is_tied, unwrap
from llmtune.plan.stages import Plan


def insert(model: PreTrainedModel, adapter: AdapterSpec, plan: Plan, base: Base) -> PreTrainedModel | PeftModel:
    """Return the model with an adapter in every block that the plan ever trains; the model itself without one."""
    config = adapter.peft_config(model, plan)
    if base.added:
        _train_tokens(config, model, plan, base)
    if config is None:
        return model
    try:
        tuned = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise FieldError("method.adapter", f"PEFT refuses this model: {first_line(error)}") from error
    # get_peft_model puts the folder's path in place of a name: a private path would be published.
    config.base_model_name_or_path = base.hub_id or base.name
    config.revision = base.revision if base.hub_id == base.name else None
    return tuned


def _train_tokens(config: PeftConfig | None, model: PreTrainedModel, plan: Plan, base: Base) -> None:
    """Have the rows of the base's new tokens trained; raises FieldError where adapter or plan cannot."""
    if plan.peak(len(blocks(model)) + 1) <= 0:
        message = "the plan never trains the embeddings, where new tokens are; try kind full, with or without lora"
        raise FieldError("model.add_tokens", message)
    if config is None:
        return
    if not isinstance(config, LoraConfig):
        raise FieldError("model.add_tokens", "PEFT trains new tokens under LoRA alone; try lora, or no adapter")
    names = {module: name for name, module in model.named_modules()}
    matrices = [model.get_input_embeddings(), *([] if is_tied(model) else [model.get_output_embeddings()])]
    config.trainable_token_indices = {names[one]: list(base.added) for one in matrices}


def count_adapted(model: nn.Module) -> dict[str, int]:
    """Return how many layers of each name carry an adapter."""
    names = [_short(name) for name in adapted_names(model)]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def adapted_names(model: nn.Module) -> list[str]:
    """Return the full names, as in the base, of the layers and tensors of experts that carry an adapter."""
    names = []
    for path, module in unwrap(model).named_modules():
        if isinstance(module, ParamWrapper):
            name = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            names.append(name.removesuffix(".weight"))
        elif isinstance(module, BaseTunerLayer):
            names.append(path)
    return names


def _short(name: str) -> str:
    """The last part of a name; of a tensor of experts, which layers may share a name with, the last two."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-2:-1] == ["experts"] else parts[-1:])


def trained_tensors(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """Return the parameters that ever train under a plan, by name; with an adapter, the adapter's alone."""
    distance, adapted = distances(model), isinstance(model, PeftModel)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in distance and plan.peak(distance[name]) > 0 and (parameter.requires_grad or not adapted)
    }
