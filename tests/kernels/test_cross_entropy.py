"""Cross-entropy with its gradient made on the way: torch's value and gradient."""

import pytest
import torch
from torch.nn import functional

from llmtune.kernels.cpu import cross_entropy as cross_entropy_module
from llmtune.kernels.cpu.cross_entropy import cross_entropy


def both(dtype: torch.dtype, outer: float = 1.0, spread: float = 3.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Value and gradient, ours and torch's."""
    torch.manual_seed(0)
    logits, targets = (torch.randn(13, 301) * spread).to(dtype), torch.randint(0, 301, (13,))
    made = []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        plain = functional.cross_entropy(leaf.float(), targets, reduction="sum") / 7
        value = cross_entropy(leaf, targets, 1 / 7) if ours else plain
        (value * outer).backward()
        made.append((value.detach(), leaf.grad))
    return made


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("outer", [1.0, 3.0])
def test_value_and_gradient_are_torchs(rows: int, outer: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_module, "ELEMENTS", rows * 301)
    (value, gradient), (plain_value, plain) = both(torch.float32, outer)
    torch.testing.assert_close(value, plain_value, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-8)


def test_in_bf16_the_gradient_is_rounded_once() -> None:
    (value, gradient), (plain_value, plain) = both(torch.bfloat16)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, plain_value, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, plain, rtol=2**-7, atol=1e-9)
    assert (gradient != plain).float().mean() < 0.01


def test_large_logits_do_not_overflow() -> None:
    (value, gradient), (plain_value, plain) = both(torch.float32, spread=1e4)
    torch.testing.assert_close(value, plain_value, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-8)


def test_without_a_gradient_none_is_made() -> None:
    with torch.no_grad():
        value = cross_entropy(torch.zeros(2, 4), torch.tensor([1, 2]), 0.5)
    assert value.item() == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert not value.requires_grad
