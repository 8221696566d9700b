"""Default learning rates follow model size, LoRA's also its alpha and start; the plan says what a rate means."""

from typing import Any

import pytest

from llmtune.adapters.kinds import KINDS
from llmtune.plan.stages import Facts
from tests.support import training

SMALL = Facts(blocks=30, hidden=576, parameters=134_515_008)


def adapter(kind: str, **fields: Any) -> Any:
    """A validated adapter."""
    return training.spec({"kind": "full", "adapter": {"kind": kind, **fields}}).method.adapter


def rate(kind: str, parameters: float = 135e6, **fields: Any) -> float:
    """An adapter's default rate where every block trains."""
    return float(adapter(kind, **fields).default_rate(Facts(30, 576, int(parameters)), 1.0))


@pytest.mark.parametrize(
    ("parameters", "rates"),
    [
        (135_000_000, {"none": 3e-4, "lora": 2e-3, "ia3": 5e-3, "bottleneck": 1e-3, "vera": 1e-2}),
        (1_000_000_000, {"none": 3e-5, "lora": 5e-4, "ia3": 5e-3, "bottleneck": 5e-4, "vera": 5e-3}),
        (8_000_000_000, {"none": 1e-5, "lora": 3e-4, "ia3": 5e-3, "bottleneck": 3e-4, "vera": 3e-3}),
        (70_000_000_000, {"none": 5e-6, "lora": 2e-4, "ia3": 3e-3, "bottleneck": 1e-4, "vera": 2e-3}),
        (1_000, {"none": 3e-4, "lora": 2e-3, "ia3": 5e-3, "bottleneck": 1e-3, "vera": 1e-2}),
        (10**12, {"none": 5e-6, "lora": 2e-4, "ia3": 3e-3, "bottleneck": 1e-4, "vera": 2e-3}),
    ],
)
def test_default_rates_match_the_table_and_are_flat_outside_it(parameters: int, rates: dict[str, float]) -> None:
    assert {kind: rate(kind, parameters) for kind in KINDS} == rates


def test_default_rates_fall_between_the_columns_of_the_table() -> None:
    between = [rate("lora", size) for size in (135e6, 3e8, 6e8, 1e9, 3e9, 8e9, 3e10, 7e10)]
    assert between == sorted(between, reverse=True)
    assert rate("lora", (1e9 * 8e9) ** 0.5) == pytest.approx((5e-4 * 3e-4) ** 0.5, rel=0.03)


def test_lora_rate_falls_with_its_alpha() -> None:
    assert rate("lora") == 2e-3
    assert rate("lora", alpha=64) == 1e-3
    assert rate("lora", rank=64, alpha=32 / 8, rslora=True) == rate("lora")
    assert rate("lora", rank=128) == rate("lora")
    assert rate("lora", init="pissa") == 2e-4
    assert rate("lora", init="olora") == pytest.approx(2e-3 / 18, rel=0.03)


def test_notes_say_what_a_lora_rate_means() -> None:
    lora = adapter("lora", rank=16, alpha=64)
    assert lora.rate_notes(2e-4) == ["learning rate at alpha 32: 4e-4"]
    assert "known to diverge" in lora.rate_notes(2e-3)[1]
    assert "published optima lie between" in lora.rate_notes(1e-5)[1]
    assert len(lora.rate_notes(lora.default_rate(SMALL, 1.0))) == 1
    for other in set(KINDS) - {"lora"}:
        assert adapter(other).rate_notes(1.0) == []
