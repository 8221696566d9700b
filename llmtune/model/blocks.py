"""Finds a model's transformer blocks, and each parameter's distance from the output, by module structure."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks: the outermost ModuleList as long as the config's num_hidden_layers."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} blocks")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def distances(model: nn.Module) -> dict[str, int]:
    """The distance of every parameter: 0 head and final norm, 1 last block, ..., L first block, L+1 embeddings.

    A tied matrix is listed once, as the embedding. Adapter parameters have the distance of the layer they adapt.
    """
    layers = blocks(model)
    count = len(layers)
    by_id: dict[int, int] = {}
    for index, block in enumerate(layers):
        by_id.update({id(parameter): count - index for parameter in block.parameters()})
    for module in model.modules():
        if isinstance(module, nn.Embedding) or isinstance(getattr(module, "base_layer", None), nn.Embedding):
            for parameter in module.parameters():
                by_id.setdefault(id(parameter), count + 1)
    return {name: by_id.get(id(parameter), 0) for name, parameter in model.named_parameters()}
