"""Autocast for tensors without content: torch's own passes the meta device by, so a trace casts as a GPU would."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmtune.estimate.attention import attend
from llmtune.estimate.products import Products, grouped_product
from llmtune.kernels.device import autocast_dtype, autocast_on_meta
from llmtune.kernels.recompute import RMSNorm

LOWERED = frozenset(
    [
        "addbmm",
        "addmm",
        "addmv",
        "addr",
        "baddbmm",
        "bmm",
        "chain_matmul",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_tbc",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "convolution",
        "einsum",
        "linear",
        "matmul",
        "mm",
        "mv",
        "prelu",
        "scaled_dot_product_attention",
    ]
)
"""What computes in 16 bits, as torch/include/ATen/autocast_mode.h lists it for CUDA."""
IN_FP32 = frozenset(
    [
        "acos",
        "asin",
        "cosh",
        "cumprod",
        "cumsum",
        "erfinv",
        "exp",
        "expm1",
        "group_norm",
        "layer_norm",
        "log",
        "log10",
        "log1p",
        "log2",
        "log_softmax",
        "logsumexp",
        "pow",
        "prod",
        "reciprocal",
        "rms_norm",
        "rsqrt",
        "sinh",
        "softmax",
        "softplus",
        "sum",
        "tan",
    ]
)
"""What CUDA computes in fp32, of the same file; CPUs compute it in the precision that comes."""
_OPERATORS = {"__matmul__": "matmul", "__rmatmul__": "matmul", "__pow__": "pow", "__rpow__": "pow", "square": "pow"}
_rms_norm: Callable[..., torch.Tensor] = RMSNorm.apply
_META = torch.device("meta")
_WITH_DTYPE = frozenset({"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"})
"""A data type that is asked for stands."""


class TooManyCalls(Exception):  # noqa: N818
    """A model called more functions of torch than it was allowed to."""


class MetaAutocast(TorchFunctionMode):
    """Casts as autocast does on a kind of device, attends as its fused kernels do, and counts matrix products.

    `dtype` is None where nothing is cast. `casts` are the copies of weights that autocast keeps for a forward pass.
    More than `most` calls raise TooManyCalls.
    """

    def __init__(self, dtype: torch.dtype | None, kind: str, most: int | None = None) -> None:
        super().__init__()
        self.dtype, self._kind, self._most = dtype, kind, most
        self._stack = ExitStack()
        self.casts: dict[int, torch.Tensor] = {}
        self.products, self.calls = Products(), 0

    def __enter__(self) -> "MetaAutocast":
        """Begin to cast; layers that ask for the precision of autocast are told."""
        self._stack.enter_context(autocast_on_meta(self.dtype))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Cast no more."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute a function of torch on tensors as autocast would."""
        self.calls += 1
        if self._most is not None and self.calls > self._most:
            raise TooManyCalls
        kwargs = kwargs or {}
        name = str(getattr(function, "__name__", ""))
        name = _OPERATORS.get(name, name)
        if autocast_dtype(_META) is not None:
            args, kwargs = self._cast(name, args, kwargs)
        self.products.count(name, args, kwargs)
        if name == "scaled_dot_product_attention":
            return attend(function, self._kind, *args, **kwargs)
        if name in ("grouped_mm", "_grouped_mm"):
            return grouped_product(*args[:2])
        if name == "rms_norm":
            return _fused_norm(*args, **kwargs)
        return function(*args, **kwargs)

    def _cast(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if name in LOWERED:
            change: Callable[[torch.Tensor], torch.Tensor] = self._lower
        elif self._kind == "cuda" and name in IN_FP32 and not (name in _WITH_DTYPE and kwargs.get("dtype")):
            change = _widen
        else:
            return args, kwargs
        return change_tensors((args, kwargs), change)

    def _lower(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == self.dtype or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self.dtype)
        if id(tensor) not in self.casts:
            self.casts[id(tensor)] = tensor.to(self.dtype)
        return self.casts[id(tensor)]


def _fused_norm(
    x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """The shapes of a fused norm, which keeps its input and a number a row; on the meta device torch writes it out."""
    scale = x.new_ones(shape) if weight is None else weight
    return _rms_norm(x, scale, torch.finfo(x.dtype).eps if eps is None else eps)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def change_tensors(value: object, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A value whose tensors, in lists, tuples and dicts too, are changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: change_tensors(one, change) for key, one in value.items()}
    if type(value) is list or type(value) is tuple:
        return type(value)(change_tensors(one, change) for one in value)
    return value
