"""Patches on GPUs, tried on CPU tensors: which there are, how much they launch, and that a compiler can follow them."""

from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from llmtune.kernels import device
from llmtune.kernels.install import install
from llmtune.kernels.recompute import patch_norms
from llmtune.model.blocks import blocks
from tests.kernels.test_recompute import norm
from tests.support.gpu_ways import Calls, adapted, answer_for_gpu, arguments, joiner_of
from tests.support.layers import relative_error, run_layer


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_for_gpu(monkeypatch)


class OneLaunch(torch.autograd.Function):
    """An RMS norm as a GPU launches it: a kernel forward; one backward, and one that adds up the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: object, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return gradients[0].clone(), None, weight.clone() if ctx.needs_input_grad[2] else None, None


def launches(model: Any) -> int:
    """How many operations compute in a pass forward and backward."""
    with Calls() as calls:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.arange(3, 19).view(2, 8), use_cache=False).logits
        logits.sum().backward()
    return len(calls.names)


@pytest.mark.parametrize(("adapter", "share"), [("lora", 0.7), ("none", 0.85)])
def test_launches_less_than_the_plain_path(adapter: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", adapter)
    if adapter == "lora":
        for parameter in (parameter for parameter in model.parameters() if not parameter.requires_grad):
            parameter.data = parameter.data.bfloat16()
    plain = launches(model)
    install(model, arguments(bf16=True))
    monkeypatch.setattr(nn.functional, "rms_norm", OneLaunch.apply)
    assert launches(model) <= share * plain


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_a_compiler_follows_a_patched_block(adapter: str) -> None:
    model = adapted("llama", adapter)
    install(model, arguments())
    assert "forward" in vars(blocks(model)[0].mlp)
    block = blocks(model)[0]
    x, angles = torch.randn(2, 8, model.config.hidden_size, requires_grad=True), torch.randn(1, 8, 8)
    with joiner_of(model):
        plain = block(x, position_embeddings=(angles, angles))
        whole = torch.compile(block, backend="eager", fullgraph=True)(x, position_embeddings=(angles, angles))
    gradients = [torch.autograd.grad(out.pow(2).sum(), x)[0] for out in (plain, whole)]
    assert relative_error(whole.detach(), plain.detach()) <= 1e-6
    assert relative_error(gradients[0], gradients[1]) <= 1e-6


def test_installs_nothing_that_only_cpus_gain_from() -> None:
    model = adapted("llama", "lora", tie_word_embeddings=True)
    assert install(model, arguments(bf16=True)) is None
    names = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert names == {"LlamaRMSNorm", "LlamaMLP", Linear.__name__}
    assert not model.get_input_embeddings().sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_in_one_launch_equal_the_models_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, own = norm(dtype), norm(dtype)
    assert patch_norms(ours) == 1
    x = torch.randn(3, 7, 48).to(dtype)
    exact = run_layer(own.float(), x.float())
    fused, mixed = nn.functional.rms_norm, set[bool]()

    def watched(*arguments: Any) -> torch.Tensor:
        mixed.add(torch.is_autocast_enabled("cpu"))
        return fused(*arguments)

    monkeypatch.setattr(nn.functional, "rms_norm", watched)
    results = [run_layer(ours, x, mixed=True), run_layer(norm(dtype), x, mixed=True)]
    assert mixed == {False}, "autocast on GPUs would return fp32"
    for mine, other, true in zip(*results, exact, strict=True):
        assert mine.dtype == other.dtype == dtype
        assert relative_error(mine, true) <= 1.1 * relative_error(other, true) + 1e-6
    monkeypatch.setattr(device, "on_cpu", lambda device: True)
    assert torch.equal(run_layer(ours, x)[0], run_layer(norm(dtype), x)[0])
