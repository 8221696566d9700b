"""How many bytes of tensors live at one time while a block computes forward and backward, without any content."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from llmtune.model.trace import MetaChoices


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operation and count what it makes."""
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self._add(one.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        size = storage.nbytes()
        self._known.add(id(storage))
        weakref.finalize(storage, self._free, id(storage), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_of_block(block: nn.Module, arguments: Any, options: Any, autocast: TorchFunctionMode) -> int:
    """The most bytes that a block's forward and backward pass take at one time beyond what the forward pass keeps.

    The block is called with `arguments` and `options`, which `autocast` casts; gradients of weights do not count.
    """
    arguments, options = (tree_map(_detached, one) for one in (arguments, options))
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in block.parameters() if p.requires_grad]
    try:
        with LiveBytes() as counted, autocast, MetaChoices():
            output = block(*arguments, **options)
            hidden = output[0] if isinstance(output, tuple) else output
            kept = counted.live
            if hidden.requires_grad:
                hidden.backward(torch.empty_like(hidden))
    finally:
        for hook in hooks:
            hook.remove()
    return counted.peak - kept


def _detached(value: Any) -> Any:
    """A tensor without its history."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
