"""How many bytes of tensors live at one time while a block computes forward and backward, without any content."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.estimate.autocast import change_tensors
from llmtune.model.trace import MetaChoices


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, while they live, but for those of `ignored` shapes."""

    def __init__(self, ignored: set[tuple[int, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._ignored = ignored
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute an operation and count what it makes."""
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor) and tuple(one.shape) not in self._ignored:
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


def folded_shapes(module: nn.Module) -> set[tuple[int, ...]]:
    """The shapes of the weights that PEFT adds LoRA to before they compute, of their parts, and of the transposes."""
    weights = [wrapper.get_param() for wrapper in module.modules() if isinstance(wrapper, ParamWrapper)]
    whole = {tuple(weight.shape) for weight in weights}
    both = whole | {shape[-2:] for shape in whole}
    return both | {(*shape[:-2], shape[-1], shape[-2]) for shape in both}


def fold_on_meta(model: nn.Module) -> None:
    """Let weights that PEFT adds LoRA to have it added where there is no content: its own way asks for an autocast."""
    for wrapper in (module for module in model.modules() if isinstance(module, ParamWrapper)):
        vars(wrapper)["forward"] = partial(_folded, wrapper)


def _folded(wrapper: ParamWrapper, *arguments: object, **options: object) -> Any:
    inner, weight = wrapper.base_layer, wrapper.get_param()
    if weight.ndim == 3:
        left, right, scale = wrapper.get_delta_factors("default")
        total = torch.baddbmm(weight, left, right, alpha=scale)
    else:
        total = weight + wrapper.get_delta_weight("default")
    name = next(name for name, parameter in inner.named_parameters() if parameter is weight)
    return torch.func.functional_call(inner, {name: total}, arguments, options)


def working_bytes(
    block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], autocast: TorchFunctionMode
) -> int:
    """The most bytes that a block's passes take at one time beyond what its forward pass keeps.

    The block is called with `arguments` and `options`, which `autocast` casts. Gradients of weights, and weights with
    an adapter added, are told by their shapes and do not count.
    """
    arguments, options = change_tensors((arguments, options), _detached)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    weights = {tuple(shape) for parameter in trained for shape in (parameter.shape, parameter.shape[::-1])}
    weights |= folded_shapes(block)
    with LiveBytes(weights) as counted, autocast, MetaChoices():
        output = block(*arguments, **options)
        hidden = output[0] if isinstance(output, tuple) else output
        kept = counted.live
        if hidden.requires_grad:
            hidden.backward(torch.empty_like(hidden))
    for parameter in trained:
        parameter.grad = None
    return counted.peak - kept


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its history, that gets a gradient where it can have one."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())
