"""Finds the parameters that compute before and after a model's blocks, by running it on text without the blocks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from llmtune.errors import FieldError, first_line

_TUPLES = range(4)
"""What a block may return: hidden states alone (0), or first in a tuple of this length."""


@dataclass
class Around:
    """The ids of the parameters that compute before the first block, and of those that compute after it."""

    before: set[int] = field(default_factory=set)
    after: set[int] = field(default_factory=set)


def trace_around(model: PreTrainedModel, blocks: nn.ModuleList) -> Around:
    """The parameters outside the blocks that two tokens pass; raises FieldError where the model does not take them."""
    reason = ""
    for length in _TUPLES:
        around = Around()
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                MetaChoices(),
                _traced(model, blocks, length, around),
            ):
                _run(model)
        # Any library may fail here in a way of its own; what the first way of returning meets tells most.
        except Exception as error:
            reason = reason or first_line(error)
            continue
        return around
    raise FieldError("model.base", f"{type(model).__name__} does not run on two tokens: {reason}")


def _run(model: PreTrainedModel) -> None:
    device = model.get_input_embeddings().weight.device
    # Stubbed blocks give no router's logits.
    quiet = {"output_router_logits": False} if hasattr(model.config.get_text_config(), "output_router_logits") else {}
    mixed = len({one.dtype for one in model.parameters() if one.is_floating_point()}) > 1 and device.type != "meta"
    with torch.autocast("cpu" if device.type == "meta" else device.type, torch.bfloat16, enabled=mixed):
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False, **quiet)


@contextmanager
def _traced(model: PreTrainedModel, blocks: nn.ModuleList, length: int, around: Around) -> Iterator[None]:
    """Let blocks return what they are given, and note in `around` what computes before and after them."""
    reached: list[bool] = []

    def pass_on(*arguments: torch.Tensor, **options: torch.Tensor) -> Any:
        reached.append(True)
        hidden = arguments[0] if arguments else options["hidden_states"]
        return (hidden, None, None)[:length] if length else hidden

    def note(module: nn.Module, *_: object) -> None:
        whole = all(inner is not blocks for inner in module.modules())
        ids = {id(parameter) for parameter in module.parameters(recurse=whole)}
        (around.after if reached else around.before).update(ids)

    inside = {id(module) for module in blocks.modules()}
    with ExitStack() as stack:
        for module in model.modules():
            if id(module) not in inside:
                stack.callback(module.register_forward_pre_hook(note).remove)
        for block in blocks:
            stack.enter_context(_computing(block, pass_on))
        yield


@contextmanager
def _computing(block: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Let a block compute by another function for a while."""
    own = vars(block).get("forward")
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            vars(block)["forward"] = own


class MetaChoices(TorchFunctionMode):
    """Answers what code asks of values on the meta device, which has none: true, one, and no token is padding."""

    _ANSWERS: ClassVar = {torch.Tensor.__bool__: True, torch.Tensor.item: 1, torch.Tensor.__contains__: False}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function in self._ANSWERS and args[0].is_meta:
            return self._ANSWERS[function]
        return function(*args, **(kwargs or {}))
