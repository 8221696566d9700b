"""A merge reads and writes the base's files one by one; the weights are those of a merge in memory, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.adapters.delta import load_delta
from llmtune.errors import ProofError
from llmtune.kernels.finite import is_finite
from llmtune.merging.compact import units
from llmtune.merging.proof import jitter
from llmtune.merging.shards.hollow import Weights
from llmtune.merging.shards.merge import merge_by_shards
from llmtune.merging.shards.write import ShardWriter
from llmtune.merging.step import merge
from llmtune.model.base import build_skeleton, load_model
from llmtune.model.files.locate import locate_base
from llmtune.model.files.stored import INDEX, SINGLE, stored_tensors
from tests.support import architectures, runs, tiny

IDS = [list(range(3, 40)), list(range(80, 100))]
FULL, FROZEN = {"kind": "full", "lr": 1e-3}, {"kind": "frozen", "reach": 1, "lr": 1e-3}
EXPERTS = {"kind": "lora", "rank": 2, "targets": ["q_proj", "gate_up_proj", "down_proj"]}
FORMS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "dora-gpt2": ({**FULL, "adapter": {"kind": "lora", "rank": 4, "dora": True}}, "gpt2", True),
    "pissa": ({**FULL, "adapter": {"kind": "lora", "rank": 2, "init": "pissa"}}, "llama", False),
    "vera": ({**FULL, "adapter": {"kind": "vera", "rank": 4}}, "llama", False),
    "bottleneck-above": ({**FROZEN, "adapter": {"kind": "bottleneck", "size": 4}}, "gpt2", True),
    "frozen": (FROZEN, "llama", True),
    "experts": ({**FULL, "adapter": EXPERTS}, "mixtral", False),
    "full-experts": (FULL, "mixtral", True),
}


def save_in_files(folder: Path, kind: str, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A base in several files."""
    model = tiny.model(kind, tied=tied).to(dtype)
    model.save_pretrained(folder, max_shard_size="24KB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's files."""
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


@pytest.mark.parametrize("form", FORMS)
def test_merged_files_are_those_of_a_merge_in_memory_and_the_rest_is_the_base_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    method, kind, tied = FORMS[form]
    run = runs.trained(tmp_path, method, base=save_in_files(tmp_path / "base", kind, tied), step=0.1)
    base = locate_base(run.recipe().model)
    whole: Any = load_delta(load_model(base), run.delta)
    whole = whole.merge_and_unload() if isinstance(whole, PeftModel) else whole
    held = watch_memory(monkeypatch)
    (tmp_path / "merged").mkdir()
    changed = merge_by_shards(base, run.delta, IDS, torch.bfloat16).write(tmp_path / "merged", base)
    largest = max(sum(one.numel() for one in unit.parameters()) for unit in units(build_skeleton(base)))
    assert 0 < max(held) <= largest
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    expected = whole.to(torch.bfloat16).state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in stock.state_dict().items())
    before, after = all_tensors(base.folder), all_tensors(tmp_path / "merged")
    assert set(before) == set(after)
    other = {name for name, one in before.items() if not torch.equal(one, after[name])}
    assert changed == len(other)
    assert len(other) < len(before) or method is FULL
    names = json.loads((tmp_path / "merged" / INDEX).read_text())["weight_map"]
    assert {name: tensor.file.name for name, tensor in stored_tensors(tmp_path / "merged", "it").items()} == names
    if "bottleneck" not in form:
        base_files = {name: tensor.file.name for name, tensor in stored_tensors(base.folder, "it").items()}
        assert names == base_files


def watch_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the numbers of the base's parameters that are in memory, whenever some are read."""
    held: list[int] = []
    fill = Weights.fill

    def counted(weights: Weights, parameters: Any) -> Any:
        own = fill(weights, parameters)
        real = (one for one in weights.names if one.untyped_storage().nbytes() > 4 * one.element_size())
        held.append(sum(one.numel() for one in real))
        return own

    monkeypatch.setattr(Weights, "fill", counted)
    return held


def test_new_file_begins_where_the_limit_is_reached(tmp_path: Path) -> None:
    tensors = {f"layer{number}": torch.full((10,), float(number)) for number in range(5)}
    files = ShardWriter(tmp_path, 80)
    for name, tensor in tensors.items():
        files.add(name, tensor)
    files.finish()
    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [2, 2, 1]
    assert {name: float(one[0]) for name, one in all_tensors(tmp_path).items()} == {
        f"layer{number}": number for number in range(5)
    }
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"]["layer4"] == "model-00003-of-00003.safetensors"
    (tmp_path / "one").mkdir()
    alone = ShardWriter(tmp_path / "one")
    alone.add("layer", torch.ones(3))
    alone.finish()
    assert [file.name for file in (tmp_path / "one").iterdir()] == [SINGLE]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_changes_are_as_large_as_rounding_errors_on_the_root_mean_square(dtype: torch.dtype) -> None:
    exact = torch.randn(1024, 512, generator=torch.Generator().manual_seed(1))
    exact[3, :5] = 0
    narrow = exact.to(dtype).float()
    changed, again = narrow.clone(), narrow.clone().T
    jitter(4, changed, torch.finfo(dtype).eps)
    jitter(4, again.T, torch.finfo(dtype).eps)
    steps = changed - narrow
    assert torch.equal(changed, again.T)
    assert not steps[3, :5].any()
    assert steps.count_nonzero() == steps.numel() - 5
    apart = narrow.frexp().mantissa.abs() != 0.5  # below a power of two, numbers are half as far apart
    assert torch.equal(changed.to(dtype).float()[apart], narrow[apart])
    assert float(steps.square().mean() / (exact - narrow).square().mean()) == pytest.approx(1, rel=0.02)
    signs = steps.sign()
    assert float(signs.mean().abs()) < 0.01
    assert float((signs[1:] * signs[:-1]).mean().abs()) < 0.01
    assert float((signs.view(-1)[:-8192] * signs.view(-1)[8192:]).mean().abs()) < 0.01  # of one random number's bits


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_seen(number: float) -> None:
    weight = torch.randn(37, 5)
    assert is_finite(weight)
    assert is_finite(torch.empty(0, 5))
    weight[36, 2] = number
    assert not is_finite(weight)


def test_float16_has_its_own_bound(tmp_path: Path, quick: None) -> None:
    run = runs.trained(tmp_path, runs.LORA, merge={"dtype": "float16"}, step=0.2)
    facts = merge(run)
    assert {tensor.dtype for tensor in all_tensors(run.merged).values()} == {torch.float16}
    assert json.loads((run.merged / "config.json").read_text())["dtype"] == facts["dtype"] == "float16"
    assert facts["gap_on_disk"] < 1e-5 < facts["rounding"] < 0.02
    assert facts["gap"] <= facts["bound"]


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_weight_beyond_float16_is_named(tmp_path: Path, name: str) -> None:
    base = tiny.save_base(tmp_path / "base")
    tensors = load_file(base / SINGLE)
    tensors[name].flatten()[3] = 70000.0
    save_file(tensors, base / SINGLE, {"format": "pt"})
    run = runs.trained(tmp_path, runs.LORA, base=base, merge={"dtype": "float16"})
    with pytest.raises(ProofError, match=rf"{name}: has a weight of (70000|699\d\d).*, and float16 ends at 65504"):
        merge(run)
    assert not [path for path in run.path.iterdir() if "merged" in path.name]


def test_model_that_changes_weights_as_it_runs_is_merged_in_memory(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    architectures.model("rwkv").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    run = runs.trained(tmp_path, FULL, base=tmp_path / "base", merge={"dtype": "float32"}, step=0.02)
    assert merge(run)["by"] == "memory"
    assert "this architecture is merged in memory: its blocks do not compute one by one" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_base_that_lost_a_file_or_a_part_of_one_is_named(tmp_path: Path, damage: str) -> None:
    run = runs.trained(tmp_path, base=save_in_files(tmp_path / "base", "llama"))
    file = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ProofError, match=f"{file.name}: {'changed' if damage == 'cut' else 'is missing'} since the run"
    ):
        merge(run)
    assert not [path for path in run.path.iterdir() if "merged" in path.name]
