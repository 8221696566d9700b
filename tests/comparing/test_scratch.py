"""The scratch baseline: the base's architecture, tokenizer and precision, with random weights of a seed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtune.comparing.baselines.scratch import learning_rate, scratch_arm
from llmtune.model.base import Base, load_model
from llmtune.model.tokens import load_tokenizer
from llmtune.recipe.sections import Recipe
from tests.support import tiny


def _base(folder: Path) -> Base:
    return Base(folder, str(folder), None, None)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("gpt2", True), ("qwen3", False)])
def test_is_the_bases_architecture_with_other_weights(tmp_path: Path, kind: str, tied: bool) -> None:
    """Files have the base's names, shapes and precision; tied weights stay tied; it loads as a base."""
    folder, scratch = tiny.save_base(tmp_path / "base", kind, tied=tied, hidden=64), tmp_path / "scratch"
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    stored.save_pretrained(folder)
    state = torch.get_rng_state()
    scratch_arm(_base(folder), scratch, 3)
    assert torch.equal(torch.get_rng_state(), state)
    old, new = (load_file(one / "model.safetensors") for one in (folder, scratch))
    assert {name: (one.shape, one.dtype) for name, one in new.items()} == {
        name: (one.shape, torch.bfloat16) for name, one in old.items()
    }
    matrices = [name for name, one in old.items() if one.dim() > 1]
    assert not any(torch.equal(old[name], new[name]) for name in matrices)
    assert all(0.008 < new[name].float().std().item() < 0.03 for name in matrices)
    model = load_model(_base(scratch), torch.bfloat16)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    text = "what is 3 plus 4?"
    assert load_tokenizer(_base(scratch))(text).input_ids == load_tokenizer(_base(folder))(text).input_ids
    assert json.loads((scratch / "generation_config.json").read_text())["eos_token_id"] == 2


def test_is_written_once_a_seed(tmp_path: Path) -> None:
    """The same seed gives the same weights, another one others; a complete folder stays, a damaged one does not."""
    folder, scratch = tiny.save_base(tmp_path / "base"), tmp_path / "scratch"
    weights = scratch / "model.safetensors"
    arm = scratch_arm(_base(folder), scratch, 0)
    written, first = weights.stat().st_mtime_ns, weights.read_bytes()
    assert scratch_arm(_base(folder), scratch, 0) == arm
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(first[:-8])
    scratch_arm(_base(folder), scratch, 0)
    assert weights.read_bytes() == first
    scratch_arm(_base(folder), scratch, 1)
    assert weights.read_bytes() != first


def test_arm_trains_every_weight_of_a_recipe_of_any_kind(tmp_path: Path) -> None:
    """Its overrides make a quantized recipe with added tokens a plain training of the folder."""
    folder = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(4))
    model = {"base": str(folder), "quantize": "4bit", "add_tokens": ["<new>"]}
    file = tiny.write_recipe(tmp_path / "r.json", folder, rows, {"kind": "qlora"}, model=model)
    arm = scratch_arm(_base(folder), tmp_path / "scratch", 0)
    recipe = Recipe.load(file, list(arm.set))
    assert recipe.model.base == str(tmp_path / "scratch")
    assert (recipe.model.quantize, recipe.model.add_tokens, recipe.method.kind) == ("none", (), "full")
    assert [learning_rate(int(count)) for count in (1e6, 1.35e8)] == [1e-3, 1e-3]
    assert learning_rate(int(1.35e8 * 32)) == pytest.approx(2.5e-4)
