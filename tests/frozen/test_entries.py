"""Entries of the cache: the same weights in another form have outputs of their own."""

from pathlib import Path

import torch

from llmtune.frozen.boundary import Span
from llmtune.frozen.cache import CachePolicy, FrozenBlocks
from llmtune.model.base import Base, build_skeleton, model_facts
from llmtune.model.quantize import load_quantized, split_linear_layers
from tests.support import tiny, training


def test_shares_nothing_between_recipes_that_quantize_other_blocks(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", blocks=4, hidden=64)
    base = Base(tmp_path / "base", "tiny", None, None)
    skeleton = build_skeleton(base)
    policy = CachePolicy(tmp_path / "cache", {"quantize": "4bit"}, None, 2**30, False)
    counts = []
    for deepest in (2, 3, 2):
        method = {"kind": "gradual", "reaches": [1, deepest], "lr": 0.01}
        plan = training.spec(method).method.plan(model_facts(skeleton))
        model = load_quantized(base, split_linear_layers(skeleton, plan, adapted=False), torch.float32)
        frozen_blocks = FrozenBlocks([[5, 6, 7], [8, 9]], policy)
        frozen_blocks.begin(model, [Span(3, 99)], {"model.norm.weight": 0}, torch.enable_grad)
        assert frozen_blocks.kept == [3]
        counts.append(len(list((tmp_path / "cache").iterdir())))
    assert counts == [1, 2, 2]
