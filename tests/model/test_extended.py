"""New tokens: the base that has them, what trains of it, and what is saved, merged and published with it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmtune import recipe as recipes
from llmtune.adapters.delta import load_delta
from llmtune.errors import FieldError, RecipeError
from llmtune.evaluation.loaded_model import LoadedModel
from llmtune.merging.step import merge
from llmtune.model.base import load_model
from llmtune.model.files import extended
from llmtune.model.files.extended import _with_rows
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer
from llmtune.run import Run
from llmtune.training.loop import _frozen_blocks, train
from llmtune.training.prepare import layout_of, plan_alone, prepare
from tests.support import runs, tiny, wrappers

TOKENS = ("<order>", "zwiebelrostbraten")
LORA = {"kind": "full", "lr": 0.05, "adapter": {"kind": "lora", "rank": 4}}
FULL = {"kind": "full", "lr": 0.05}
GRADUAL = {"kind": "gradual", "reaches": [1, "all"], "lr": 0.05}
STOCK = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(delta)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model.resize_token_embeddings(len(tokenizer))
tuned = PeftModel.from_pretrained(model, delta).eval()
ids = tokenizer(text, return_tensors="pt").input_ids
logits += tuned(ids).logits[0, -1].tolist()
"""


def trained(folder: Path, method: dict[str, Any], tied: bool, **sections: Any) -> Run:
    """A run of three steps on rows that hold the new tokens."""
    base = tiny.save_base(folder / "base", tied=tied)
    rows = [{"prompt": f"<order> {n}", "completion": f"zwiebelrostbraten {n}"} for n in range(12)]
    file = tiny.write_rows(folder / "rows.jsonl", rows)
    model = {"base": str(base), "add_tokens": list(TOKENS)}
    train_settings = {"max_steps": 3, "batch_size": 4}
    recipe = tiny.write_recipe(folder / "r.yaml", base, file, method, model=model, train=train_settings, **sections)
    run = prepare(recipes.load(recipe), folder / "run", 0)
    train(run)
    return run


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_new_tokens_are_trained_saved_and_merged(
    tmp_path: Path, method: dict[str, Any], tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.reload_here(monkeypatch)
    run = trained(tmp_path, method, tied)
    base = locate_base(run.recipe().model)
    tokenizer = load_tokenizer(base)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert ids == list(base.added)
    assert [tokenizer(token, add_special_tokens=False).input_ids for token in TOKENS] == [[one] for one in ids]
    before = load_model(base)
    tuned = load_delta(load_model(base), run.delta)
    text = tokenizer("<order> 3 zwiebelrostbraten", return_tensors="pt").input_ids
    live = tuned(text).logits
    merge(run)
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    torch.testing.assert_close(merged(text).logits, live, rtol=0.05, atol=0.05)
    assert AutoTokenizer.from_pretrained(run.merged).convert_tokens_to_ids(list(TOKENS)) == ids
    words, old = merged.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert len(words) == max(ids) + 1
    moved = (words.float() - old).abs().amax(1)
    assert all(moved[one] > 1e-3 for one in ids)
    if method is LORA:
        untouched = [one for one in range(len(words)) if one not in ids]
        assert moved[untouched].max() < 0.01  # rounded to bfloat16, and no more
    if not tied:
        head = merged.get_output_embeddings().weight.float() - before.get_output_embeddings().weight
        assert all(head.abs().amax(1)[one] > 1e-3 for one in ids)


def test_adapter_loads_with_peft_alone_on_the_base_as_it_was(tmp_path: Path) -> None:
    run = trained(tmp_path, LORA, tied=True)
    text = "<order> 3 zwiebelrostbraten"
    stock: list[float] = []
    exec(STOCK, {"base": str(tmp_path / "base"), "delta": str(run.delta), "text": text, "logits": stock})
    base = locate_base(run.recipe().model)
    tokenizer = load_tokenizer(base)
    ids = tokenizer(text, return_tensors="pt").input_ids
    tuned = load_delta(load_model(base), run.delta)
    live = tuned(ids).logits[0, -1]
    torch.testing.assert_close(torch.tensor(stock)[: len(live)], live, rtol=0, atol=1e-5)
    # lm-eval ties the weights of the model that it is given; PEFT has put a layer in the place of the embeddings.
    scored = LoadedModel(tuned, tokenizer, 1, False, "tuned").model
    assert torch.equal(scored(ids).logits[0, -1], live)


def test_new_token_starts_as_the_mean_of_what_it_was_read_as(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tied=True)
    plain = locate_base(recipes.sections.Model(base=str(base)))
    longer = locate_base(recipes.sections.Model(base=str(base), add_tokens=TOKENS))
    pieces = load_tokenizer(plain)(TOKENS[1], add_special_tokens=False).input_ids
    old, new = (load_model(one).get_input_embeddings().weight for one in (plain, longer))
    assert len(pieces) > 1
    torch.testing.assert_close(new[longer.added[1]], old[pieces].mean(0))
    assert torch.equal(new[: len(old)], old)
    name = next(name for name in load_file(plain.folder / "model.safetensors") if "layers.0" in name)
    assert torch.equal(load_model(plain).get_parameter(name), load_model(longer).get_parameter(name))
    assert locate_base(recipes.sections.Model(base=str(base), add_tokens=TOKENS)) == longer


def test_cached_outputs_are_of_the_same_new_tokens(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(8))
    facts = []
    for token in ("<a>", "<b>"):
        model = {"base": str(base), "add_tokens": [token]}
        file = tiny.write_recipe(tmp_path / "r.yaml", base, rows, GRADUAL, model=model)
        recipe = recipes.load(file)
        located = replace(locate_base(recipe.model), revision="a commit")  # of the base without new tokens
        blocks = _frozen_blocks(recipe, located, layout_of(recipe), [[1]], None, torch.float32, None)
        assert blocks is not None
        facts.append(blocks._policy.facts)
    assert facts[0] != facts[1]


def test_length_that_a_configuration_leaves_open_is_written_into_its_text_model() -> None:
    config = AutoConfig.for_model("gemma3")
    open_ = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    assert _with_rows(open_, config, 300_000)["text_config"]["vocab_size"] == 300_000
    rows = config.text_config.vocab_size
    named = {"vocab_size": rows, "text_config": {"vocab_size": rows}, "vision_config": {"vocab_size": 7}}
    longer = _with_rows(named, config, 300_000)
    assert longer == {"vocab_size": 300_000, "text_config": {"vocab_size": 300_000}, "vision_config": {"vocab_size": 7}}


def test_takes_along_what_belongs_to_a_base_and_no_file_from_elsewhere(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    (base / "consolidated.pth").write_text("weights of another library")
    (base / "README.md").write_text("license: mit")
    (tmp_path / "private.txt").write_text("private")
    (base / "LICENSE").symlink_to(tmp_path / "private.txt")
    section = recipes.sections.Model(base=str(base), add_tokens=TOKENS)
    with pytest.raises(FieldError, match="LICENSE is a link to a file outside the base's folder; replace it"):
        locate_base(section)
    (base / "LICENSE").unlink()
    (base / "LICENSE").write_text("MIT")
    names = {file.name for file in locate_base(section).folder.iterdir()}
    assert {"LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors"} <= names
    assert "consolidated.pth" not in names


def test_refuses_new_tokens_of_a_model_with_a_second_table_of_them(tmp_path: Path) -> None:
    base = wrappers.save_base(tmp_path / "base", "gemma4")
    with pytest.raises(FieldError, match=r"model\.add_tokens: .* has a second table of tokens \(.*embed_tokens_per"):
        locate_base(recipes.sections.Model(base=str(base), add_tokens=TOKENS))


@pytest.mark.parametrize(
    ("tokens", "method", "words"),
    [
        (["hi", "hi"], FULL, "model.add_tokens.1: 'hi' is named twice"),
        ([" "], FULL, "model.add_tokens.0: is empty"),
        (["a"], FULL, "model.add_tokens.0: 'a' is a token of this base already"),
        (["new"], {"kind": "frozen", "reach": 1}, "model.add_tokens: the plan never trains the embeddings"),
        (["new"], {"kind": "full", "adapter": {"kind": "ia3"}}, "model.add_tokens: PEFT trains new tokens under LoRA"),
    ],
    ids=["twice", "empty", "known", "out of reach", "ia3"],
)
def test_refuses_tokens_that_cannot_be_new(
    tmp_path: Path, tokens: list[str], method: dict[str, Any], words: str
) -> None:
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(8))
    model = {"base": str(base), "add_tokens": tokens}
    recipe = recipes.load(tiny.write_recipe(tmp_path / "r.yaml", base, rows, method, model=model))
    with pytest.raises(RecipeError) as error:
        plan_alone(recipe, 0)
    assert words in str(error.value)


def test_bases_used_least_recently_leave_the_cache_but_none_that_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    base, cache = tiny.save_base(tmp_path / "base"), tmp_path / "cache" / "extended"
    in_use = locate_base(recipes.sections.Model(base=str(base), add_tokens=("<one>",))).folder
    size = sum(file.lstat().st_size for file in in_use.iterdir())
    for age, name in ((10, "used"), (20, "unused"), (30, "oldest")):
        (cache / name).mkdir()
        (cache / name / "weights").write_bytes(b"x" * size)
        (cache / name / "linked").symlink_to(in_use / "model.safetensors")
        os.utime(cache / name, (1e9 - age,) * 2)
    os.utime(in_use, (1e8,) * 2)
    monkeypatch.setattr(extended, "LIMIT", round(3.5 * size))
    newest = locate_base(recipes.sections.Model(base=str(base), add_tokens=("<two>",))).folder
    assert {folder.name for folder in cache.iterdir()} == {in_use.name, newest.name, "used"}
    assert (in_use / "model.safetensors").is_file()
    monkeypatch.setattr(extended, "LIMIT", 0)
    locate_base(recipes.sections.Model(base=str(base), add_tokens=("<three>",)))
    assert len(list(cache.iterdir())) == 3, "what this process uses stays, whatever the limit"
