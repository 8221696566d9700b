"""Cross-entropy with its gradient computed in the forward pass: torch's value and gradient."""

import pytest
import torch
from torch.nn import functional

from llmtune.kernels import device
from llmtune.kernels.cpu import cross_entropy as cross_entropy_module
from llmtune.kernels.cpu.cross_entropy import cross_entropy

Result = tuple[torch.Tensor, torch.Tensor]


def both(
    dtype: torch.dtype, outer: float = 1.0, spread: float = 3.0, scale: float | torch.Tensor = 1 / 7
) -> tuple[Result, Result]:
    """Value and gradient, ours and torch's."""
    torch.manual_seed(0)
    logits, targets = (torch.randn(13, 301) * spread).to(dtype), torch.randint(0, 301, (13,))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = cross_entropy(ours, targets, scale)
    expected = functional.cross_entropy(theirs.float(), targets, reduction="sum") / 7
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad(loss * outer, leaf) for loss, leaf in ((value, ours), (expected, theirs))
    )
    return (value.detach(), gradient), (expected.detach(), expected_gradient)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("outer", [1.0, 3.0])
def test_matches_torch_value_and_gradient(rows: int, outer: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_module, "MAX_ELEMENTS", rows * 301)
    (value, gradient), (expected, expected_gradient) = both(torch.float32, outer)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_matches_torch_where_nothing_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda device: False)
    (value, gradient), (expected, expected_gradient) = both(torch.float32, scale=torch.tensor(1 / 7))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_rounds_a_bf16_gradient_once() -> None:
    (value, gradient), (expected, expected_gradient) = both(torch.bfloat16)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=1e-9)
    assert (gradient != expected_gradient).float().mean() < 0.01


def test_does_not_overflow_on_large_logits() -> None:
    (value, gradient), (expected, expected_gradient) = both(torch.float32, spread=1e4)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_computes_no_gradient_without_grad_mode() -> None:
    with torch.no_grad():
        value = cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]), 0.5)
    assert value.item() == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert not value.requires_grad


def test_refuses_a_second_backward_pass() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 2]), 0.5)
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="was used by an earlier backward pass"):
        torch.autograd.grad(loss, logits)
