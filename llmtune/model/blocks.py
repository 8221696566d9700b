"""Finds a model's transformer blocks, and each parameter's distance from the output, by module structure."""

from peft import LoraConfig, PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from llmtune.errors import FieldError
from llmtune.model.trace import trace_around


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks: the one outermost list in the text model as long as the config's num_hidden_layers.

    Raises FieldError for a model that has no such list, or several.
    """
    text = text_model(model)
    count = getattr(text.config, "num_hidden_layers", None)
    lists = [layers for layers in _outermost_lists(text) if count in (None, len(layers))]
    if len(lists) == 1:
        return lists[0]
    layers = "layers" if count is None else f"{count} layers"
    has = f"has {len(lists)} lists of {layers}" if lists else f"has no list of {layers}"
    raise FieldError("model.base", f"{type(unwrap(model)).__name__} {has}, so its blocks cannot be told")


def text_model(model: nn.Module) -> PreTrainedModel:
    """The part of a model that reads text: the outermost one whose configuration is the text configuration."""
    whole = unwrap(model)
    text = whole.config.get_text_config()
    return next((m for m in whole.modules() if isinstance(m, PreTrainedModel) and m.config is text), whole)


def decoder(model: nn.Module) -> nn.Module:
    """The part of a model that computes the last hidden states from token ids: all of it but the head."""
    whole = unwrap(model)
    part: PreTrainedModel = whole.base_model
    if part is not whole:
        return part
    # Llama 4 hides it under another name than its class says.
    ends, head = blocks(whole), whole.get_output_embeddings()
    parts = (one for one in text_model(whole).modules() if isinstance(one, PreTrainedModel))
    inside = ((one, set(one.modules())) for one in parts)
    return next((one for one, modules in inside if ends in modules and head not in modules), whole)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embeddings' matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def distances(model: nn.Module) -> dict[str, int]:
    """The distance of every parameter: 0 head and final norm, 1 last block, ..., L first block, L+1 embeddings.

    A tied matrix is listed once, as the embedding; a parameter of several blocks by the farthest of them. Adapter
    parameters have the distance of the layer they adapt. What text does not reach, such as a vision tower, has none.
    """
    layers = blocks(model)
    count = len(layers)
    by_id: dict[int, int] = {}
    for index, block in enumerate(layers):
        for parameter in block.parameters():
            by_id.setdefault(id(parameter), count - index)
    around = trace_around(unwrap(model), layers)
    by_id |= dict.fromkeys(around.after, 0) | dict.fromkeys(around.before, count + 1)
    named = {name: by_id.get(id(parameter)) for name, parameter in model.named_parameters()}
    return {name: distance for name, distance in named.items() if distance is not None}


def renamed_by_peft(model: nn.Module, names: list[str]) -> list[str]:
    """The layers that PEFT would not adapt by their names: in some models it puts experts in their place."""
    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, None)
    return [name for name in names if name not in config.target_modules]


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The lists of modules with parameters that lie in no other list."""
    lists: list[nn.ModuleList] = []
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            lists += _outermost_lists(child)
        elif any(True for _ in child.parameters()):
            lists.append(child)
    return lists
