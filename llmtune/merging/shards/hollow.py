"""A model whose weights are not in memory, and what puts some of them there for a while."""

import contextlib
import math
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from llmtune.adapters.delta import TENSORS, load_delta, tensor_names
from llmtune.errors import LlmtuneError, lacks_memory
from llmtune.merging.shards.stored import StoredWeights, UnsupportedError
from llmtune.model.base import Base, load_config
from llmtune.model.kinds import auto_class


def build_hollow(base: Base) -> tuple[PreTrainedModel, StoredWeights]:
    """The model of a base in fp32 with its buffers, but zeros without memory as its parameters, and its stored weights.

    Raises UnsupportedError where such a model cannot be built.
    """
    config = load_config(base)
    try:
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()
        hollowed: PreTrainedModel = model.eval().requires_grad_(False)
        _hollow_out(hollowed)
        stored = StoredWeights(base, hollowed)
        _read_buffers(hollowed, stored)
    except (RuntimeError, KeyError, AttributeError) as error:
        if isinstance(error, LlmtuneError) or lacks_memory(error):
            raise
        raise UnsupportedError(f"its empty model cannot be built ({type(error).__name__})") from error
    return hollowed, stored


def _hollow_out(model: nn.Module) -> None:
    """Give every parameter, each once where matrices are tied, zeros that take no memory."""
    hollow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = nn.Parameter(_without_memory(parameter.shape, 0.0), requires_grad=False)
            setattr(module, name, hollow.setdefault(id(parameter), empty))


def _without_memory(shape: torch.Size, value: float) -> torch.Tensor:
    return torch.full((1,) * len(shape), value).expand(shape)


def _read_buffers(model: nn.Module, stored: StoredWeights) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = stored.read([name for name in stored.keys if name not in parameters])
    for name, tensor in buffers.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, tensor)


class Weights:
    """Reads a model's parameters when they are needed; what a delta replaces comes from the delta's file."""

    def __init__(self, model: PreTrainedModel, stored: StoredWeights) -> None:
        """Know a hollow model's parameters by name."""
        self.stored = stored
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self._shapes = {parameter: parameter.shape for parameter in self.names}
        self.replaced: dict[str, Path] = {}
        """The parameters that a delta replaces, and its file."""
        self.empty(self.names)

    def tune(self, model: PreTrainedModel, delta: Path) -> PreTrainedModel | PeftModel:
        """The tuned model; raises ProofError for a delta whose names or shapes are not those of the model."""
        for parameter in self.names:
            parameter.data = _without_memory(parameter.shape, 0.0)  # adapters start from finite numbers
        tuned = load_delta(model, delta, as_stored=True)
        if (delta / TENSORS).is_file():
            self.replaced = dict.fromkeys(tensor_names(delta), delta / TENSORS)
        self.empty(self.names)
        return tuned

    def fill(self, parameters: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
        """Put the numbers of the model's own parameters among these into memory, in fp32; returns those by name."""
        own = {self.names[parameter]: parameter for parameter in parameters if parameter in self.names}
        tensors = self.stored.read([name for name in own if name not in self.replaced]) | self._replacements(own)
        for name, tensor in tensors.items():
            own[name].data = tensor
        return own

    def empty(self, parameters: Iterable[nn.Parameter]) -> None:
        """Free the numbers of the model's own parameters among these; whoever reads them computes no number."""
        for parameter in parameters:
            if parameter in self.names:
                parameter.data = _without_memory(self._shapes[parameter], math.nan)

    def _replacements(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        tensors = {}
        with contextlib.ExitStack() as stack:
            files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in {*self.replaced.values()}}
            for name in names:
                if name in self.replaced:
                    tensors[name] = files[self.replaced[name]].get_tensor(name).float()
        return tensors
