"""One model is base and tuned in turn, by its adapter or by its trained tensors, and holds no second base."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.inference import switch
from llmtune.inference.switch import load_switchable
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from tests.support import runs

IDS = torch.arange(3, 40)[None]
FROZEN = {"kind": "frozen", "reach": 1, "lr": 1e-3}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("method", "fits"),
    [(runs.LORA, True), ({"kind": "full"}, True), (FROZEN, False)],
    ids=["adapter", "all tensors", "some tensors, on the host"],
)
def test_one_model_is_base_and_tuned_in_turn_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], fits: bool
) -> None:
    run = runs.trained(tmp_path, method, step=0.3)
    base = locate_base(run.recipe().model)
    expected_base, expected_tuned = logits(load_model(base)), logits(runs.load_tuned(run))
    held: list[torch.nn.Parameter] = []

    def fits_twice(parameters: list[torch.nn.Parameter]) -> bool:
        held.extend(parameters)
        return fits

    monkeypatch.setattr(switch, "_fits_twice", fits_twice)
    model, as_base = load_switchable(load_model(base), run.delta)
    for _ in range(2):
        assert torch.equal(logits(model), expected_tuned)
        with as_base():
            assert torch.equal(logits(model), expected_base)
    with pytest.raises(KeyboardInterrupt), as_base():
        raise KeyboardInterrupt
    assert torch.equal(logits(model), expected_tuned)
    assert not torch.equal(expected_tuned, expected_base)
    weights = sum(one.numel() for one in model.parameters())
    share = sum(one.numel() for one in held) / weights
    assert (share == 0, share == 1) == (method is runs.LORA, method["kind"] == "full" and method is not runs.LORA)
