"""What merging makes of a part of a model whose weights are in memory."""

import copy
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from llmtune.errors import ProofError
from llmtune.merging.adding import add_adapters, refuse_infinite
from llmtune.model.blocks import unwrap
from llmtune.model.mlp import width_key

Tuned: TypeAlias = PreTrainedModel | PeftModel


class Change:
    """Adds a model's adapters to the weights of one of its parts, and forgets it when these are freed."""

    def __init__(self, tuned: Tuned) -> None:
        """Find the adapters that make the model wider; those of PEFT add themselves to their layers."""
        find: Any = getattr(tuned.base_model, "wide_mlps", None) if isinstance(tuned, PeftModel) else None
        self.wide = {wide.mlp.down: wide for wide in (find() if find else ())}
        """By the last layer of an MLP, the MLP as it will be."""

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Add the adapters in some modules to their weights; raises ProofError where one is not finite then."""
        for module in modules:
            wide = [self.wide[one] for one in module.modules() if one in self.wide]
            for one in wide:
                one.widen()
                refuse_infinite(one.mlp.down, one.mlp.name)
            if not self.wide:
                add_adapters(module)

    def forget(self, modules: Iterable[nn.Module]) -> None:
        """Let the adapters in some modules be added again, to weights that are read anew."""
        for module in modules:
            for one in module.modules():
                if one in self.wide:
                    self.wide[one].narrow()
                elif isinstance(one, BaseTunerLayer):
                    one.merged_adapters.clear()

    def stock(self, tuned: Tuned) -> PreTrainedModel:
        """The merged model without its weights (meta device); raises ProofError where no configuration says so wide."""
        model = unwrap(tuned)
        config = copy.deepcopy(model.config)
        for wide in [*self.wide.values()][:1]:
            try:
                setattr(config.get_text_config(), width_key(model, wide.mlp.width), wide.mlp.width + wide.size)
            except ValueError as error:
                raise ProofError(str(error)) from error
        with torch.device("meta"):
            return type(model)(config)
