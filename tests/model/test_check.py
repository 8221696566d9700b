"""A base whose files are not its model's is refused by names and shapes, before a weight or a row is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmtune import recipe
from llmtune.adapters.delta import load_delta
from llmtune.errors import RecipeError
from llmtune.model import check
from llmtune.model.base import Base, build_skeleton, load_model
from llmtune.model.files.fingerprints import fingerprint_base
from llmtune.training.loop import train
from llmtune.training.prepare import examine, plan_alone, prepare
from tests.support import tiny

Tensors = dict[str, torch.Tensor]
KINDS = ("llama", "gpt2", "mixtral", "gemma2", "qwen3", "gpt_neox")


def check_base(base: Base) -> None:
    """Check a base against its own skeleton."""
    check.check_base(base, build_skeleton(base))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Write a base's weights anew."""
    file = folder / "model.safetensors"
    changed = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})


def shard(folder: Path) -> Path:
    """Split a base's weights into two files with an index; gives the second one."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder / "model-2.safetensors"


def set_config(folder: Path, **values: Any) -> None:
    """Change keys of a base's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def refusal(folder: Path, tmp_path: Path) -> str:
    """What check and plan say of a base, both the same; the file of rows holds none, as it is not read."""
    (tmp_path / "rows.jsonl").write_text("no JSON")
    settings = recipe.load(tiny.write_recipe(tmp_path / "r.yaml", folder, tmp_path / "rows.jsonl"))
    with pytest.raises(RecipeError) as checked:
        examine(settings, 0)
    with pytest.raises(RecipeError) as planned:
        plan_alone(settings, 0)
    assert str(checked.value) == str(planned.value)
    assert "\n" not in str(checked.value)
    assert checked.value.exit_code == 2
    prefix = f"{tmp_path / 'r.yaml'}:3: model.base: "
    assert str(checked.value).startswith(prefix)
    return str(checked.value).removeprefix(prefix).replace(f"{folder}", "BASE")


@pytest.mark.parametrize("kind", KINDS)
def test_takes_what_the_architecture_itself_stores(tmp_path: Path, kind: str) -> None:
    folder = tiny.save_base(tmp_path / "base", kind=kind)
    base = Base(folder, "b", None, None)
    check_base(base)
    rewrite(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    check_base(base)
    load_model(base)


@pytest.mark.parametrize(
    "extra", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "lm_head.weight"]
)
def test_takes_what_is_recomputed_or_tied(tmp_path: Path, extra: str) -> None:
    folder = tiny.save_base(tmp_path / "base", tied=True)
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda tensors: {**tensors, extra: head if "head" in extra else torch.ones(4)})
    check_base(Base(folder, "b", None, None))
    load_model(Base(folder, "b", None, None))


@pytest.mark.parametrize(
    ("kind", "attention", "buffers"),
    [
        ("gpt2", "transformer.h.0.attn", ["bias", "masked_bias"]),
        ("gpt_neo", "transformer.h.0.attn.attention", ["bias", "masked_bias"]),
        ("gptj", "transformer.h.0.attn", ["bias", "masked_bias"]),
        ("gpt_neox", "gpt_neox.layers.0.attention", ["bias", "masked_bias", "rotary_emb.inv_freq"]),
        ("falcon", "transformer.h.0.self_attention", ["maybe_rotary.inv_freq"]),
        ("gemma3_text", "model.layers.0.self_attn", ["rotary_emb.inv_freq"]),
    ],
)
def test_takes_masks_and_frequencies_that_older_versions_stored(
    tmp_path: Path, kind: str, attention: str, buffers: list[str]
) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "gptj": {"rotary_dim": 4, "n_embd": 32, "n_layer": 2, "n_head": 4},
    }
    folder = tiny.save_base(tmp_path / "base", kind=kind, **sizes.get(kind, {}))
    stored = {f"{attention}.{name}": torch.ones(4) for name in buffers}
    rewrite(folder, lambda tensors: {**tensors, **stored})
    check_base(Base(folder, "b", None, None))
    load_model(Base(folder, "b", None, None))


@pytest.mark.parametrize(
    ("prefix", "maker"),
    [
        ("_orig_mod.", " (as torch.compile writes them)"),
        ("base_model.model.", " (as PEFT writes them)"),
        ("module.", " (as a parallel wrapper writes them)"),
        ("policy.net.", ""),
    ],
)
def test_refuses_weights_under_other_names_and_says_which(tmp_path: Path, prefix: str, maker: str) -> None:
    folder = tiny.save_base(tmp_path / "base")
    rewrite(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert refusal(folder, tmp_path) == (
        f"BASE: its tensors' names start with {prefix!r}{maker}, and the model's do not; save it without that prefix"
    )


def without(part: str) -> Callable[[Tensors], Tensors]:
    """A change that takes out the tensors with that part in their names."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("lm_head", "lack lm_head.weight, which would start at random"),
        ("layers.1.mlp.up", "lack model.layers.1.mlp.up_proj.weight, which"),
        ("layers.1.", "lack model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "),
        ("norm", "(5 tensors), which would start at random"),
    ],
)
def test_refuses_missing_tensors_by_name(tmp_path: Path, part: str, words: str) -> None:
    folder = tiny.save_base(tmp_path / "base", tied=False)
    rewrite(folder, without(part))
    assert words in refusal(folder, tmp_path)
    with pytest.raises(RecipeError, match="lack"):
        load_model(Base(folder, "b", None, None))


def test_refuses_a_missing_expert_by_name(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base", kind="mixtral")
    names = [name for name in load_file(folder / "model.safetensors") if ".experts.3." in name]
    rewrite(folder, without(names[0]))
    assert f"lack {names[0]}, which" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    "name", ["v_head.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"]
)
def test_refuses_tensors_that_would_be_lost(tmp_path: Path, name: str) -> None:
    folder = tiny.save_base(tmp_path / "base")
    rewrite(folder, lambda tensors: {**tensors, name: torch.ones(3)})
    assert f"hold {name}, which the model of its config.json has no place for" in refusal(folder, tmp_path)
    with pytest.raises(RecipeError, match="no place for"):
        load_model(Base(folder, "b", None, None))


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_hidden_layers", "head_dim"])
def test_refuses_the_config_of_another_model(tmp_path: Path, key: str) -> None:
    folder = tiny.save_base(tmp_path / "base")
    set_config(folder, **{key: json.loads((folder / "config.json").read_text())[key] + 2})
    said = refusal(folder, tmp_path)
    assert ("is stored as [" in said and "but config.json makes it [" in said) or "lack model.layers.2." in said


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_refuses_layers_without_number_at_once(tmp_path: Path, key: str) -> None:
    folder = tiny.save_base(tmp_path / "base")
    set_config(folder, **{key: 10**9})
    assert refusal(folder, tmp_path) == f"BASE: config.json cannot be read: {key} is 1e+09, more than any model has"


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 124083\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_refuses_a_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    folder = tiny.save_base(tmp_path / "base")
    (folder / name).write_text(POINTER)
    expected = f"BASE: {name} is a Git LFS pointer, not the file itself; run `git lfs pull` there"
    assert refusal(folder, tmp_path) == expected


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("how", ["folder", "broken link", "empty"])
def test_refuses_what_stands_in_place_of_a_small_file(tmp_path: Path, name: str, how: str) -> None:
    folder = tiny.save_base(tmp_path / "base")
    (folder / name).unlink()
    make = {
        "folder": (folder / name).mkdir,
        "broken link": lambda: (folder / name).symlink_to("nowhere"),
        "empty": (folder / name).touch,
    }
    make[how]()
    article = "" if how == "empty" else "a "
    assert refusal(folder, tmp_path) == f"BASE: {name} is {article}{how}; download it again"


def test_refuses_half_a_file(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "model.safetensors is damaged or incomplete (" in refusal(folder, tmp_path)


def test_checks_every_file_of_an_index(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    second = shard(folder)
    check_base(Base(folder, "b", None, None))
    second.rename(folder / "aside")
    assert refusal(folder, tmp_path) == "BASE lacks model-2.safetensors, which its index names; download it again"
    shutil.copy(folder / "model-1.safetensors", second)
    assert "model-1.safetensors and model-2.safetensors both store " in refusal(folder, tmp_path)


def test_weights_in_another_form_beside_the_shards_are_no_part_of_a_base(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base", kind="mistral")
    shard(folder)
    base = Base(folder, "b", None, None)
    before = fingerprint_base(base)
    assert {"model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"} < set(before)
    (folder / "consolidated.safetensors").write_text(POINTER)
    check_base(base)
    assert fingerprint_base(base) == before


def test_refuses_an_index_that_is_a_git_lfs_pointer(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(POINTER)
    assert "model.safetensors.index.json is a Git LFS pointer, not the file itself" in refusal(folder, tmp_path)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}', "{"])
def test_refuses_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    folder = tiny.save_base(tmp_path / "base")
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json cannot be read: " in refusal(folder, tmp_path)


def test_refuses_an_adapter_beside_the_weights(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    (folder / "adapter_config.json").write_text("{}")
    assert refusal(folder, tmp_path) == (
        "BASE also holds an adapter (adapter_config.json), which would change the base unasked; "
        "merge it into the weights first, or name the base without it"
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "fbgemm_fp8", "compressed-tensors"])
def test_refuses_weights_stored_quantized_by_name(tmp_path: Path, method: str) -> None:
    folder = tiny.save_base(tmp_path / "base")
    set_config(folder, quantization_config={"quant_method": method, "bits": 4})
    assert f"BASE is stored quantized ({method}); only 16 and 32 bits" in refusal(folder, tmp_path)
    set_config(folder, quantization_config={})
    assert "BASE is stored quantized (None); only 16 and 32 bits" in refusal(folder, tmp_path)


@pytest.fixture(scope="module")
def in_4bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose weights bitsandbytes stored in 4 bits."""
    folder = tmp_path_factory.mktemp("4bit")
    plain = tiny.save_base(folder / "plain", hidden=64)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    return folder / "base"


LORA = {"kind": "full", "adapter": {"kind": "lora", "rank": 4}}


@pytest.mark.parametrize(
    ("method", "sections", "key"),
    [
        (LORA, {}, "merge.enabled"),
        ({"kind": "full", "lr": 0.1}, {"merge": {"enabled": False}}, "method.adapter"),
        (LORA, {"merge": {"enabled": False}, "memory": {"frozen_blocks": "stream"}}, "memory.frozen_blocks"),
    ],
)
def test_says_before_training_what_weights_stored_in_4_bits_cannot(
    tmp_path: Path, in_4bit: Path, method: dict[str, Any], sections: dict[str, Any], key: str
) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(8))
    settings = recipe.load(tiny.write_recipe(tmp_path / "r.yaml", in_4bit, rows, method, **sections))
    with pytest.raises(RecipeError, match=rf"{key}: {in_4bit} is stored in 4 bits \(bitsandbytes\), so "):
        examine(settings, 0)


def test_trains_an_adapter_on_weights_stored_in_4_bits(tmp_path: Path, in_4bit: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(12))
    file = tiny.write_recipe(tmp_path / "r.yaml", in_4bit, rows, LORA, merge={"enabled": False})
    run = prepare(recipe.load(file), tmp_path / "run", 0)
    train(run)
    tuned = load_delta(load_model(Base(in_4bit, "b", None, None)), run.delta)
    moved = [name for name, tensor in tuned.named_parameters() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == 14


def test_checks_the_names_of_weights_stored_in_4_bits(tmp_path: Path, in_4bit: Path) -> None:
    folder = Path(shutil.copytree(in_4bit, tmp_path / "base"))
    check_base(Base(folder, "b", None, None))
    rewrite(folder, without("layers.1.mlp.up_proj"))
    with pytest.raises(RecipeError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight, which"):
        check_base(Base(folder, "b", None, None))
