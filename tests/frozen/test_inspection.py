"""Models whose frozen blocks cannot be stubbed are known by one short row, before anything is built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmtune.errors import FieldError
from llmtune.frozen.boundary import Span
from llmtune.frozen.cache import CachePolicy, FrozenBlocks
from llmtune.frozen.stand_in import StubbedDecoder
from llmtune.frozen.stream import OffloadedBlocks
from llmtune.model.base import Base
from tests.support import architectures, tiny
from tests.support.cached import assert_equal, fit

ROWS = [[5, 6, 7], [8, 9]]
NEEDS = "this model's blocks need more than the output of the block below"
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def sharing() -> PreTrainedModel:
    """A Gemma 4 whose fourth block reads keys and values that the second one wrote."""
    kinds = ["sliding_attention", "full_attention"] * 2
    return architectures.model("gemma4_text", blocks=4, layer_types=kinds, num_kv_shared_layers=1)


def begin(model: PreTrainedModel, policy: CachePolicy, boundary: int) -> str | None:
    """What the cache says of a model whose blocks below a boundary are frozen."""
    spans, distance = [Span(boundary, 99)], {"model.norm.weight": 0}
    return FrozenBlocks(ROWS, policy).begin(model, spans, distance, torch.enable_grad)


def test_finds_blocks_that_read_what_lower_ones_wrote_and_restores_the_model() -> None:
    model = sharing().train()
    decoder = StubbedDecoder(model, ROWS, torch.enable_grad)
    before = decoder.forward([0, 1])
    assert decoder.inspect([1]) is None
    assert decoder.inspect([1, 2]) == f"{NEEDS} (KeyError: 'full_attention')"
    assert all(module.training for module in model.modules())
    assert torch.equal(decoder.forward([0, 1]), before), "a block is still stubbed"


@pytest.mark.parametrize(("reach", "line"), [(3, "cached below block 1"), (2, f"not cached; {NEEDS}")])
def test_trains_a_model_whose_blocks_share_keys_with_a_cache_where_it_can_have_one(
    tmp_path: Path, reach: int, line: str
) -> None:
    method = {"kind": "frozen", "reach": reach, "lr": 0.01}
    settings: dict[str, Any] = {"steps": 4, "eval_steps": 2}
    ours = fit(tmp_path, method, model=sharing(), always=True, **settings)
    assert ours[0].startswith(f"frozen blocks: {line}")
    assert_equal(ours, fit(tmp_path, method, model=sharing(), keep=False, **settings))


def test_stream_ends_in_one_line_where_a_block_reads_what_a_lower_one_wrote(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", blocks=4)
    offloaded = OffloadedBlocks(Base(tmp_path / "base", "tiny", None, None), 3, torch.float32)
    model: Any = offloaded.load()
    written: list[torch.Tensor] = []
    model.model.register_forward_pre_hook(lambda module, arguments: written.clear())
    model.model.layers[0].mlp.register_forward_hook(lambda module, arguments, output: written.append(output))
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, arguments: (written[0],))
    policy = CachePolicy(tmp_path / "cache", {}, None, 2**30, False, offloaded)
    message = rf"memory\.frozen_blocks: stream does not work here: {NEEDS} .*list index out of range.*; try auto"
    with pytest.raises(FieldError, match=message):
        begin(model, policy, 3)


@pytest.mark.parametrize("limit", [2, 3])
@pytest.mark.parametrize(
    ("kind", "rope", "key"),
    [("phi3", LONGROPE, "original_max_position_embeddings"), ("llama", DYNAMIC, "max_position_embeddings")],
    ids=["longrope", "dynamic"],
)
def test_does_not_cache_where_a_long_row_changes_the_angles_of_others(
    tmp_path: Path, kind: str, rope: dict[str, Any], key: str, limit: int
) -> None:
    model = architectures.model(kind, blocks=4, rope_parameters=dict(rope), **{key: limit})
    line = begin(model, CachePolicy(tmp_path / "cache", {}, None, 2**30, False), 2)
    refusal = "not cached; a row of more than 2 tokens changes the rotary angles of the rows beside it"
    assert (line or "").startswith(f"frozen blocks: {refusal if limit == 2 else 'cached below block 2'}")
