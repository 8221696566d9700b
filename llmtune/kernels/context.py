"""The context that autograd hands to a function's forward and backward, with types."""

import torch
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """A context whose saved tensors have a type; a kernel's own subclass names what else it stores."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
