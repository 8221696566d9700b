"""Bases as they are stored: dequantized where that gives 16 bits, kept where an adapter trains, else refused."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from llmtune import recipe
from llmtune.adapters.delta import load_delta
from llmtune.errors import RecipeError
from llmtune.files import read_json
from llmtune.inference.placement import place
from llmtune.merging.step import merge
from llmtune.model.base import Base, build_skeleton, load_model
from llmtune.model.check import check_base
from llmtune.model.files.locate import locate_base, locate_original
from llmtune.plan.table import PlanTable
from llmtune.publishing.card import card
from llmtune.run import Run
from llmtune.terminal import plan
from llmtune.training.loop import train
from llmtune.training.prepare import examine, prepare
from tests.support import runs, tiny, wrappers

IDS = torch.arange(3, 40)[None]
LORA = {"kind": "full", "adapter": {"kind": "lora", "rank": 4}}
QUICK = {"max_steps": 1, "batch_size": 4}
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

Tensors = dict[str, torch.Tensor]


def in_mxfp4(tensor: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Random blocks and scales for experts (count, in, out), and what they stand for."""
    count, rows, columns = tensor.shape
    blocks = torch.randint(0, 256, (count, columns, rows // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 123, (count, columns, rows // 32), dtype=torch.uint8)
    numbers = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(-2)
    numbers = numbers * torch.exp2(scales.float() - 127)[..., None]
    return {"_blocks": blocks, "_scales": scales}, numbers.flatten(-2).transpose(1, 2)


def in_fp8(tensor: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A matrix in fp8 with a scale for each 16 x 16 numbers, and what that stands for, in bf16."""
    rows, columns = (size // 16 for size in tensor.shape)
    scales = torch.rand(rows, columns) / 100 + 0.01
    wide = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
    stored = (tensor / wide).to(torch.float8_e4m3fn)
    return {"": stored, "_scale_inv": scales}, (stored.float() * wide).bfloat16().float()


FORMS: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    "mxfp4": ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, in_mxfp4, lambda t: t.ndim == 3),
    "fp8": ("llama", {}, in_fp8, lambda t: t.ndim == 2),
    "fp8_experts": (
        "qwen3_moe",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
        in_fp8,
        lambda t: t.ndim == 2 and len(t) > 2,
    ),
}


def save_stored(folder: Path, form: str) -> Tensors:
    """Write a base in a stored form; gives the tensors, by their names in 16 bits, that it stands for."""
    kind, sizes, pack, packs = FORMS[form]
    heads = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "hidden_size": 64}
    tiny.save_base(folder, kind, hidden=64, **{**sizes, **heads} if kind != "llama" else {})
    stored: Tensors = {}
    expected: Tensors = {}
    torch.manual_seed(1)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".layers." in name and packs(tensor) and not name.endswith("_bias"):
            parts, expected[name] = pack(tensor)
            stored |= {name + end: part for end, part in parts.items()}
        else:
            stored[name] = tensor.bfloat16()
            expected[name] = stored[name].float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    how: dict[str, Any] = {
        "quant_method": form.split("_")[0],
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
    }
    how |= {"weight_block_size": [16, 16], "activation_scheme": "dynamic"} if "fp8" in form else {}
    set_config(folder, quantization_config=how, dtype="bfloat16")
    return expected


def set_config(folder: Path, **values: Any) -> None:
    """Change keys of a base's config.json."""
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def a_run(folder: Path, base: Path, method: dict[str, Any], **sections: Any) -> Run:
    """A prepared run of three steps."""
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(20))
    model = {"base": str(base), "precision": "fp32", **sections.pop("model", {})}
    file = tiny.write_recipe(folder / "r.yaml", base, rows, method, model=model, train=QUICK, **sections)
    return prepare(recipe.load(file), folder / "run", 0)


def mistake(folder: Path, base: Path, method: dict[str, Any] = LORA, **sections: Any) -> str:
    """What is said of a recipe before anything is loaded."""
    with pytest.raises(RecipeError) as caught:
        a_run(folder, base, method, **sections)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "")


@pytest.mark.parametrize("form", ["mxfp4", "fp8_experts"])
def test_dequantizes_what_transformers_can(tmp_path: Path, form: str) -> None:
    expected = save_stored(tmp_path / "base", form)
    base = Base(tmp_path / "base", "b", None, None)
    skeleton = build_skeleton(base)
    check_base(base, skeleton)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(base, dtype)
        assert {one.dtype for one in model.parameters()} == {dtype}
        assert {name: one.shape for name, one in model.named_parameters()} == {
            name: one.shape for name, one in skeleton.named_parameters()
        }
        model.save_pretrained(tmp_path / "plain")
        saved = load_file(tmp_path / "plain" / "model.safetensors")
        assert set(saved) == set(expected), "the names that the architecture's own files have"
        assert all(torch.equal(saved[name].float(), tensor) for name, tensor in expected.items())
    stored = load_file(tmp_path / "base" / "model.safetensors")
    del stored[next(name for name in stored if name.endswith(("_scales", "_scale_inv")))]
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"_blocks, which the model of its config|lack the scales of model\.layers"):
        check_base(base, skeleton)


@pytest.mark.parametrize(
    ("form", "method"), [pytest.param("mxfp4", {"kind": "full", "lr": 0.01}, marks=pytest.mark.slow), ("fp8", LORA)]
)
def test_trains_and_merges_a_dequantized_base(
    tmp_path: Path, form: str, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = save_stored(tmp_path / "base", form)
    run = a_run(tmp_path, tmp_path / "base", method)
    assert f"the base is stored in {'MXFP4' if form == 'mxfp4' else 'fp8'}" in read_json(run.plan_file)["notes"][0]
    train(run) if form == "mxfp4" else runs.perturbed(run)
    runs.reload_here(monkeypatch)
    facts = merge(run)
    assert facts["changed"] > 0
    merged = load_file(run.merged / "model.safetensors")
    assert {name: list(one.shape) for name, one in merged.items()} == {n: list(t.shape) for n, t in expected.items()}
    assert "quantization_config" not in read_json(run.merged / "config.json")
    tuned = load_delta(load_model(locate_base(run.recipe().model)), run.delta)(IDS).logits
    stock = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(stock, tuned, rtol=0, atol=facts["bound"])
    numbers = sum(tensor.numel() for tensor in expected.values())
    monkeypatch.setattr("llmtune.inference.placement.free_bytes", lambda device: 4 * numbers)
    assert place(run.recipe(), locate_base(run.recipe().model)).bits is None


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        (
            {"model": {"quantize": "4bit"}},
            "model.quantize: /base is stored in fp8 and dequantized as it is loaded, so ",
        ),
        ({"memory": {"frozen_blocks": "stream"}}, "memory.frozen_blocks: /base is stored in fp8 and "),
    ],
)
def test_says_before_training_what_a_dequantized_base_cannot(
    tmp_path: Path, sections: dict[str, Any], key: str
) -> None:
    save_stored(tmp_path / "base", "fp8")
    assert key in mistake(tmp_path, tmp_path / "base", **sections)


def test_refuses_scales_that_do_not_divide_their_tensor(tmp_path: Path) -> None:
    save_stored(tmp_path / "base", "fp8")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored[f"{name}_scale_inv"] = torch.ones(3, 4)
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert f"{name} is [128, 64], which its scales [3, 4] do not divide" in mistake(tmp_path, tmp_path / "base")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in 32 bits (plain), and stored by bitsandbytes in 4 and in 8."""
    folder = tmp_path_factory.mktemp("bits")
    plain = tiny.save_base(folder / "plain", hidden=64)
    for bits in (4, 8):
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
        model.save_pretrained(folder / f"{bits}bit")
        tiny.tokenizer().save_pretrained(folder / f"{bits}bit")
    save_stored(folder / "fp8", "fp8")
    return folder


@pytest.mark.parametrize("form", ["4bit", pytest.param("8bit", marks=pytest.mark.slow), "fp8"])
def test_merges_an_adapter_on_a_stored_base_into_the_original(
    tmp_path: Path, originals: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, stored = originals / "plain", originals / form
    sections = {"merge": {"dtype": "float32"}, "publish": {"repo": "me/tuned", "weights": "merged"}}
    tokens = ("<a>", "<b>") if form == "4bit" else ()
    run = a_run(tmp_path, stored, LORA, model={"merge_into": str(plain), "add_tokens": list(tokens)}, **sections)
    assert run.recipe().model.merge_into == str(plain)
    runs.perturbed(run)
    runs.reload_here(monkeypatch)
    facts = merge(run)
    assert (facts["merged_into"], facts["base"]["name"]) == ("plain", str(plain))
    assert "What was trained was merged into `plain`, which the base was made from." in card(run)
    original = locate_original(str(plain), tokens)
    live = load_delta(load_model(original), run.delta)(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(run.merged)(IDS).logits
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-4)
    assert (live - load_model(original)(IDS).logits).abs().max() > 1e-3
    if form != "fp8":
        assert f"gap to the model with the {form[0]}-bit base that was trained is 0." in capsys.readouterr().out
        plan(PlanTable.read(run.plan_file))
        assert f"14 linear layers that never train are in {form[0]} bits" in capsys.readouterr().out
        assert facts[f"gap_to_{form}"]["original"]["max"] > 0
        pissa = {**LORA, "adapter": {"kind": "lora", "rank": 4, "init": "pissa"}}
        said = mistake(tmp_path / "b", stored, pissa, model={"merge_into": str(plain)})
        assert "method.adapter.init: takes weight out of the base, which is rounded to few bits" in said
        assert f"{stored} is stored in {form[0]} bits (bitsandbytes), so no delta" in mistake(tmp_path / "b", stored)


def test_a_vision_language_model_in_4_bits_is_checked_under_the_names_in_its_files(tmp_path: Path) -> None:
    plain = wrappers.save_base(tmp_path / "plain", "gemma3")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForImageTextToText.from_pretrained(plain, quantization_config=config).save_pretrained(tmp_path / "4bit")
    base = Base(tmp_path / "4bit", "b", None, None)
    skeleton = build_skeleton(base)
    file = tmp_path / "4bit" / "model.safetensors"
    stored = load_file(file)
    name = next(name for name, one in stored.items() if one.dtype == torch.uint8 and name.endswith("q_proj.weight"))
    assert name not in skeleton.state_dict()
    check_base(base, skeleton)
    del stored[name]
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"its files lack .*q_proj\.weight, which would start at random"):
        check_base(base, skeleton)


def test_refuses_another_model_to_merge_into(tmp_path: Path, originals: Path) -> None:
    tiny.save_base(tmp_path / "other", hidden=32)
    said = {
        name: mistake(tmp_path, originals / base, model={"merge_into": str(into)})
        for name, base, into in (
            ("shape", "4bit", tmp_path / "other"),
            ("missing", "4bit", tmp_path / "nowhere"),
            ("quantized", "4bit", originals / "8bit"),
            ("plain", "plain", originals / "plain"),
        )
    }
    assert "model.merge_into: /other is not the model that" in said["shape"]
    assert "it has model.embed_tokens.weight [259, 32], the base" in said["shape"]
    assert "model.merge_into: '/nowhere' is neither a folder" in said["missing"]
    assert "8bit is stored quantized itself" in said["quantized"]
    assert "model.merge_into: is for a base that is stored quantized, and" in said["plain"]


def test_says_how_pickled_weights_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save_base(tmp_path / "a base")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    said = mistake(tmp_path, folder)
    command = said.partition("convert them with: ")[2].partition("  ")[0].replace("/a base", str(folder))
    words = shlex.split(command)
    assert words[:2] == ["python", "-c"]
    monkeypatch.chdir(tmp_path)
    exec(words[2], {})
    converted = tmp_path / "a base-safetensors"
    examine(recipe.load(tmp_path / "r.yaml", [f"model.base={converted}"]), 0)
    assert all(torch.equal(one, tensors[name]) for name, one in load_file(converted / "model.safetensors").items())
