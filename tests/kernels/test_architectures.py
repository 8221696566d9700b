"""Patched layers give the plain path's losses and gradients in every architecture, or leave it alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionMaskInterface
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llmtune.kernels.attention import AttentionRouter
from llmtune.kernels.cpu.autocast import patch_linears
from llmtune.kernels.recompute import patch_mlps, patch_norms
from tests.support import architectures, tiny, training
from tests.support.cached import LORA, assert_equal, fit
from tests.training.test_joined import padding, plainly

QUICK = ("qwen3_5_text", "bamba", "llama4_text", "lfm2")
CASES = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in architectures.KINDS]


@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.slow
def test_two_steps_equal_the_plain_ones(
    tmp_path: Path, kind: str, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"steps": 2, "eval_steps": 2}
    method = {"kind": "full", "lr": 0.01, "adapter": adapter}
    ours = fit(tmp_path, method, keep=False, model=architectures.model(kind), **more)
    plainly(monkeypatch)
    assert_equal(ours, fit(tmp_path, method, keep=False, model=architectures.model(kind), **more))


APART = ("qwen3_5_moe_text", "minimax", "granitemoehybrid", "olmo_hybrid", "lfm2_moe", "deepseek_v32")
"""Recent types whose rows are never joined: their blocks carry a state from token to token, or choose among tokens."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", architectures.RECENT)
def test_three_steps_of_recent_types_equal_the_plain_ones(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter: Any = LORA if list(architectures.RECENT).index(kind) % 2 == 0 or "moe" in kind else "none"
    method: dict[str, Any] = {"kind": "full", "lr": 0.01, "adapter": adapter}
    more: dict[str, Any] = {"steps": 3, "eval_steps": 3}
    ours = fit(tmp_path, method, keep=False, model=architectures.model(kind), **more)
    plainly(monkeypatch)
    plain = fit(tmp_path, method, keep=False, model=architectures.model(kind), **more)
    assert_equal(ours, plain)
    assert (padding(ours) > 0) == (kind in APART)


class GatedNorm(LlamaRMSNorm):
    """An RMS norm whose output a gate may scale, as in Mamba-2."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * nn.functional.silu(gate))


class DemandingNorm(GatedNorm):
    """An RMS norm that needs its gate."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden_states, gate)


class TrainingNorm(LlamaRMSNorm):
    """A norm that computes otherwise in training."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * (2 if self.training else 1)


class GroupedNorm(LlamaRMSNorm):
    """A norm whose groups decide what it computes."""

    def __init__(self, size: int, groups: int) -> None:
        super().__init__(size)
        self.groups = groups

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.groups == 1:
            return super().forward(hidden_states)
        grouped = hidden_states.view(*hidden_states.shape[:-1], self.groups, -1).float()
        grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * grouped.view(hidden_states.shape).to(hidden_states.dtype)


def test_a_norm_that_is_given_a_gate_computes_with_it() -> None:
    norm, x, gate = GatedNorm(8), torch.randn(3, 8), torch.randn(3, 8)
    expected = norm(x, gate), norm(x, gate=gate), norm(hidden_states=x), norm(x)
    assert patch_norms(norm) == 1
    for ours, other in zip((norm(x, gate), norm(x, gate=gate), norm(hidden_states=x), norm(x)), expected, strict=True):
        assert torch.equal(ours, other)


def test_leaves_a_norm_alone_that_computes_otherwise_in_training_or_needs_more() -> None:
    assert patch_norms(nn.ModuleList([TrainingNorm(8).eval(), DemandingNorm(8)])) == 0
    pair = nn.ModuleList([GroupedNorm(8, 2), GroupedNorm(8, 1), GroupedNorm(8, 2)])
    assert patch_norms(pair) == 1
    assert "forward" in vars(pair[1])


def test_an_empty_norm_of_a_streamed_block_proves_nothing() -> None:
    doubled, empty = TrainingNorm(8), TrainingNorm(8)
    empty.weight = nn.Parameter(torch.empty(0))
    assert patch_norms(nn.ModuleList([doubled, empty])) == 0
    assert patch_norms(empty) == 0


def test_leaves_an_mlp_alone_whose_activation_learns() -> None:
    mlp = LlamaMLP(tiny.config())
    mlp.act_fn = nn.PReLU()
    assert patch_mlps(mlp) == 0


def test_an_mlp_that_is_given_more_takes_its_own_way() -> None:
    class Scaled(LlamaMLP):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * scale

    mlp, x = Scaled(tiny.config()), torch.randn(2, 32)
    expected = mlp(x, 2.0), mlp(x, scale=3.0)
    assert patch_mlps(mlp) == 1
    assert torch.equal(mlp(x, 2.0), expected[0])
    assert torch.equal(mlp(x, scale=3.0), expected[1])


def test_outputs_of_patched_layers_may_be_changed_in_place(tmp_path: Path) -> None:
    model = training.trainer(tmp_path, {"kind": "full", "adapter": LORA}).model
    assert "forward" in vars(next(m for n, m in model.named_modules() if n.endswith("q_proj")))
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    x = torch.randn(2, 3, 32)
    layer(x).add_(1).sum().backward()
    linear = nn.Linear(4, 6)
    assert patch_linears(linear) == 1
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.randn(2, 3, 4)).add_(1).float().sum().backward()
    assert linear.bias.grad is not None
    assert linear.bias.grad.tolist() == [6.0] * 6


def test_attention_leaves_a_mask_that_learns_and_unknown_options_to_the_default() -> None:
    calls: list[str] = []

    def default(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        novelty: int | None = None,
        **options: object,
    ) -> tuple[torch.Tensor, None]:
        calls.append("default")
        return query.transpose(1, 2), None

    router = AttentionRouter(default, AttentionMaskInterface()["sdpa"])
    query = torch.randn(1, 2, 4, 8)
    mask = torch.zeros(1, 1, 4, 4)
    for attention_mask, options in (
        (mask, {}),
        (mask, {"is_causal": False, "sliding_window": 4}),
        (mask, {"novelty": 1}),
        (mask.clone().requires_grad_(), {}),
    ):
        router(nn.Identity(), query, query, query, attention_mask, **options)
    assert calls == ["default"] * 2
