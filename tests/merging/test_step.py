"""Merging: the folder alone is the live tuned model in the dtype of the recipe; without proof nothing is merged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.adapters.delta import ADAPTER, TENSORS, save_delta
from llmtune.errors import MachineError, ProofError
from llmtune.files import read_json, write_json
from llmtune.merging import checks
from llmtune.merging.adding import add_adapters
from llmtune.merging.shards import change, write
from llmtune.merging.shards.write import ShardWriter, rounded
from llmtune.merging.step import merge
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from llmtune.run import Run
from tests.support import architectures, runs, tiny

FP32 = {"dtype": "float32"}
FULL = {"kind": "full", "lr": 1e-3}
WRITE = ShardWriter.add


def adapter(**more: Any) -> dict[str, Any]:
    """Make the method section of a LoRA run."""
    return {**FULL, "adapter": {"kind": "lora", "rank": 4, "alpha": 8, **more}}


def stock(run: Run) -> Any:
    """Load the merged folder as stock transformers does."""
    return AutoModelForCausalLM.from_pretrained(run.merged, local_files_only=True).eval()


def unmerged(run: Run) -> bool:
    """Tell whether the run holds no merged folder, not even a partial one, and no mark of one."""
    left = [path.name for path in run.path.iterdir() if "merged" in path.name]
    return not left and not run.done("merge") and "merge" not in run.manifest()["steps"]


@pytest.mark.slow
def test_fresh_process_reads_the_tuned_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.trained(tmp_path)
    facts = merge(run)
    assert run.done("merge")
    assert facts["gap_in_memory"] < 1e-5
    assert facts["gap_on_disk"] < 1e-5
    assert 0 < facts["gap"] < 0.01 < facts["shift"]
    assert f"logit gap to the live tuned model {facts['gap']:.2g}" in capsys.readouterr().out
    stored = load_file(run.merged / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    size = (run.merged / "model.safetensors").stat().st_size
    entry = run.manifest()["steps"]["merge"]
    assert (entry["dtype"], entry["bytes"], entry["tensors"]) == ("bfloat16", size, len(stored))
    assert entry["files"]["merged/model.safetensors"]["bytes"] == size


def test_vision_base_keeps_its_tower_and_its_processor(tmp_path: Path, quick: None) -> None:
    base = architectures.save_vision_base(tmp_path / "base")
    run = runs.trained(tmp_path, adapter(), base=base, merge=FP32)
    merge(run)
    before, after = load_file(base / "model.safetensors"), load_file(run.merged / "model.safetensors")
    assert set(before) == set(after)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all("language_model" in name and "layers" in name for name in changed)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (run.merged / name).read_bytes() == (base / name).read_bytes()
    assert all("language_model.layers" in name for name in load_file(run.delta / ADAPTER))


@pytest.mark.parametrize("stored", [{"dtype": "float32"}, {"torch_dtype": "float32"}, {}])
def test_copies_everything_but_weights_from_base(tmp_path: Path, quick: None, stored: dict[str, str]) -> None:
    base = tiny.save_base(tmp_path / "base")
    config = {key: value for key, value in read_json(base / "config.json").items() if key != "dtype"}
    (base / "config.json").write_text(json.dumps(config | stored))
    (base / "LICENSE.txt").write_text("license")
    (base / "README.md").write_text("of the base")
    same = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE.txt"]
    if not stored:
        base.joinpath(same.pop(3)).unlink()
    run = runs.trained(tmp_path, base=base)
    merge(run)
    for name in same:
        assert (run.merged / name).read_bytes() == (base / name).read_bytes(), name
    key = next(iter(stored), "dtype")
    assert read_json(run.merged / "config.json") == config | {key: "bfloat16"}
    assert {path.name for path in run.merged.iterdir()} == {*same, "config.json", "model.safetensors"}
    assert stock(run).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (adapter(), {}),
        (adapter(rslora=True), {}),
        ({**FULL, "adapter": {"kind": "ia3"}}, {}),
        (FULL, {"tied": False}),
        (adapter(), {"kind": "gpt2"}),
        (FULL, {"kind": "mixtral"}),
    ],
    ids=lambda value: "-".join(map(str, value.get("adapter", value).values())) if value else "tied",
)
def test_merges_every_kind_of_delta_exactly(
    tmp_path: Path, quick: None, method: dict[str, Any], more: dict[str, Any]
) -> None:
    run = runs.trained(tmp_path, method, merge=FP32, **more)
    facts = merge(run)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        expected, actual = runs.load_tuned(run)(input_ids=ids).logits, stock(run)(input_ids=ids).logits
    assert stock(run).dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-4
    assert facts["gap"] <= facts["bound"] == 1e-4
    assert facts["shift"] > 1e-2


def test_replaces_only_trained_tensors(tmp_path: Path, quick: None) -> None:
    run = runs.trained(tmp_path, {"kind": "frozen", "reach": 1, "lr": 1e-3}, merge=FP32)
    facts = merge(run)
    delta = load_file(run.delta / TENSORS)
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(run.merged / "model.safetensors")
    assert set(merged) == set(base)
    assert all(torch.equal(tensor, delta.get(name, base[name])) for name, tensor in merged.items())
    assert 0 < facts["changed"] == len(delta) < len(base)


def test_merged_folder_alone_generates_the_same_text(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.trained(tmp_path, merge=FP32)
    merge(run)
    monkeypatch.chdir(tmp_path)
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    alone = AutoTokenizer.from_pretrained(run.merged)
    strings = [f"{n} Straße\t<|im_end|> 你 {'x' * n}\n" for n in range(20)]
    assert [alone(text).input_ids for text in strings] == [base(text).input_ids for text in strings]
    chat = {"conversation": [{"role": "user", "content": "3 plus 4?"}], "add_generation_prompt": True}
    ids = alone.apply_chat_template(**chat, return_tensors="pt")["input_ids"]
    assert ids.tolist() == base.apply_chat_template(**chat, return_tensors="pt")["input_ids"].tolist()
    answers = [
        model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        for model in (runs.load_tuned(run), stock(run))
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("tied", [True, False])
def test_refuses_adapted_head_tied_to_embedding(tmp_path: Path, quick: None, tied: bool) -> None:
    run = runs.trained(tmp_path, tied=tied, merge=FP32)
    base = locate_base(run.recipe().model)
    tuned = get_peft_model(load_model(base), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(tuned.base_model.model.lm_head.lora_B["default"].weight, std=0.1)
    save_delta(tuned, dict(tuned.named_parameters()), run.delta, base, "lora")
    run.mark("train", [run.delta])
    if tied:
        with pytest.raises(ProofError, match="lm_head is adapted, but embedding and head are one matrix"):
            merge(run)
        assert unmerged(run)
    else:
        assert merge(run)["changed"] == 1


def test_refuses_delta_that_changes_nothing(tmp_path: Path, quick: None) -> None:
    run = runs.trained(tmp_path, step=0.0)
    with pytest.raises(ProofError, match="every tensor equals the base's"):
        merge(run)
    assert unmerged(run)


def forget_delta(unit: Any) -> None:
    """Leave the adapter out instead of adding it."""
    for module in unit.modules():
        if isinstance(module, LoraLayer):
            module.merged_adapters.append("default")


def write_other_weights(files: Any, key: str, tensor: torch.Tensor) -> None:
    """Write embeddings that are 1.01 times as large."""
    WRITE(files, key, tensor * 1.01 if "embed_tokens" in key else tensor)


def lose_a_tensor(files: Any, key: str, tensor: torch.Tensor) -> None:
    """Write all tensors but one."""
    if key != "model.layers.1.mlp.down_proj.weight":
        WRITE(files, key, tensor)


def drop_one_tensor(unit: Any) -> None:
    """Add the adapters without one matrix of each block."""
    for name, module in unit.named_modules():
        if name.endswith("q_proj"):
            torch.nn.init.zeros_(module.lora_B["default"].weight)
    add_adapters(unit)


def double_alpha(unit: Any) -> None:
    """Add the adapters twice as strongly."""
    for module in unit.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 2
    add_adapters(unit)


def round_to_fp8(name: str, tensor: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Round to fewer bits than the recipe says."""
    return rounded(name, tensor.to(torch.float8_e4m3fn), dtype)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_accepts_rounding_within_its_bound(tmp_path: Path, quick: None, kind: str) -> None:
    facts = merge(runs.trained(tmp_path, adapter(), kind, step=1.0))
    assert facts["gap"] > 0.05 * facts["largest_logit"]
    assert 0.2 * facts["rounding"] < facts["gap"] <= facts["bound"] < 10 * facts["gap"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("place", "part", "broken", "message"),
    [
        (change, "add_adapters", forget_delta, "adding the delta to the weights moved hidden states after block 0"),
        (change, "add_adapters", drop_one_tensor, "adding the delta to the weights moved hidden states after block 0"),
        (change, "add_adapters", double_alpha, "adding the delta to the weights moved hidden states after block 0"),
        (write, "rounded", round_to_fp8, "writing and reading the weights moved logits"),
        (ShardWriter, "add", write_other_weights, "writing and reading the weights moved logits by .* over the bound"),
    ],
)
@pytest.mark.slow
def test_refuses_merge_over_the_bound(
    tmp_path: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    part: str,
    broken: Any,
    message: str,
    dtype: str,
) -> None:
    run = runs.trained(tmp_path, merge={"dtype": dtype})
    merge(run)
    assert run.done("merge")
    monkeypatch.setattr(place, part, broken)
    with pytest.raises(ProofError, match=message) as caught:
        merge(run)
    assert caught.value.exit_code == 5
    assert unmerged(run)
    assert (run.delta / "adapter_model.safetensors").is_file()


def test_refuses_lost_tensor_by_name(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.trained(tmp_path)
    monkeypatch.setattr(ShardWriter, "add", lose_a_tensor)
    with pytest.raises(ProofError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        merge(run)
    assert unmerged(run)


def test_refuses_changed_delta_or_base(tmp_path: Path, quick: None) -> None:
    run = runs.trained(tmp_path)
    facts = read_json(run.delta / "base.json")
    (run.delta / "base.json").write_text(json.dumps({**facts, "revision": "0" * 40}))
    with pytest.raises(ProofError, match=r"base\.json: was changed after `llmtune train`; run it again: llmtune train"):
        merge(run)
    run.mark("train", [run.delta])
    with pytest.raises(ProofError, match="at revision 0000000000000000000000000000000000000000, but the recipe names"):
        merge(run)
    other = {**facts["files"], "model.safetensors": {"bytes": 1, "sha256": "0" * 64}}
    (run.delta / "base.json").write_text(json.dumps({**facts, "files": other}))
    run.mark("train", [run.delta])
    with pytest.raises(ProofError, match=r"was trained on another .*base, whose model\.safetensors differs"):
        merge(run)
    assert unmerged(run)


def test_refuses_base_stored_quantized(tmp_path: Path, quick: None) -> None:
    run = runs.trained(tmp_path)
    config = read_json(tmp_path / "base" / "config.json")
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    for file, key in ((run.delta / "base.json", "files"), (run.manifest_file, "base")):  # of an early version
        write_json(file, {name: value for name, value in read_json(file).items() if name != key})
        run.mark("train", [run.delta])
    with pytest.raises(ProofError, match="stored quantized"):
        merge(run)


def test_refuses_link_out_of_base_folder(tmp_path: Path, quick: None) -> None:
    run = runs.trained(tmp_path)
    (tmp_path / "private.txt").write_text("private")
    (tmp_path / "base" / "LICENSE").symlink_to(tmp_path / "private.txt")
    with pytest.raises(ProofError, match="LICENSE: is a link to a file outside the base's folder"):
        merge(run)
    assert unmerged(run)


def test_refuses_too_little_disk_before_writing(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.trained(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MachineError, match=r"merging needs [\d.]+ kB of disk, but only 1\.0 kB is free"):
        merge(run)
    assert unmerged(run)


def test_removes_what_a_killed_merge_left(tmp_path: Path, quick: None) -> None:
    run = runs.trained(tmp_path)
    left = run.path / ".merged.partial-123"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    merge(run)
    assert [path.name for path in run.path.iterdir() if "merged" in path.name] == ["merged"]


def test_merges_4bit_run_into_original_base(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"base": str(tmp_path / "base"), "precision": "fp32", "quantize": "4bit"}
    run = runs.trained(tmp_path, hidden=128, model=section)
    loads: list[tuple[bool, torch.device]] = []

    def read(base: Any, *, keep: list[str] | None = None, device: torch.device, bits: int) -> Any:
        loads.append((keep is not None, device))
        return load_model(base, keep=keep, device=device, bits=bits)

    monkeypatch.setattr(checks, "load_model", read)
    facts = merge(run)
    assert loads == [(True, torch.device("cpu"))] * 2, "one model at a time, and none of them on a GPU"
    assert facts["merged_into"] == "original"
    original, back = (facts["gap_to_4bit"][name]["max"] for name in ("original", "dequantized"))
    assert 0 <= back < original  # 0 where 4-bit layers compute in fp32
    assert load_file(run.merged / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
