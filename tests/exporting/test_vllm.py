"""What vLLM is given to serve: an adapter of which it takes all, or the merged weights, with the command."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.errors import ProofError, RecipeError
from llmtune.exporting import step
from llmtune.exporting.vllm.adapter import read_adapter
from llmtune.files import read_json, write_json
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from llmtune.run import Run
from tests.support import runs


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a LoRA adapter of rank 4 on all linear layers."""
    return runs.trained(tmp_path_factory.mktemp("lora"))


def as_vllm_reads(run: Run) -> Any:
    """The base with the adapter by vLLM's rules: names cut at both ends, and one scale, alpha / rank, for all."""
    model = load_model(locate_base(run.recipe().model))
    config, tensors = read_json(run.delta / "adapter_config.json"), load_file(run.delta / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    with torch.no_grad():
        for name in (name for name in tensors if name.endswith(".lora_A.weight")):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            model.get_submodule(layer).weight += scale * (up @ tensors[name])
    return model


def test_adapter_by_vllms_rules_is_the_tuned_model(lora: Run) -> None:
    ids = torch.arange(4, 44)[None]
    with torch.no_grad():
        expected = runs.load_tuned(lora)(input_ids=ids).logits
        logits = as_vllm_reads(lora)(input_ids=ids).logits
    assert torch.allclose(logits, expected, atol=1e-5)


def test_script_serves_the_adapter_with_rank_template_and_context(
    lora: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = step.export(lora, "vllm")
    folder = lora.exported / "vllm"
    words = shlex.split(facts["command"])
    base = locate_base(lora.recipe().model)
    assert words[:4] == ["vllm", "serve", str(base.folder), "--enable-lora"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options == {
        "--lora-modules": "run=$run/delta",
        "--max-lora-rank": "8",
        "--dtype": "float32",
        "--chat-template": "$run/exported/vllm/chat_template.jinja",
        "--max-model-len": "512",
    }
    assert (folder / "chat_template.jinja").read_text() == (base.folder / "chat_template.jinja").read_text()
    assert (folder / "serve.sh").stat().st_mode & 0o111
    assert "the adapter of rank 4" in capsys.readouterr().out
    assert lora.manifest()["steps"]["export"]["forms"]["vllm"]["serves"] == "lora"


def test_script_runs_where_the_folder_is_moved_to(lora: Run, tmp_path: Path) -> None:
    step.export(lora, "vllm")
    moved = tmp_path / "it's here"
    shutil.copytree(lora.path, moved)
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    output = subprocess.run([moved / "exported/vllm/serve.sh", "--port", "1"], env=path, capture_output=True, text=True)
    words = output.stdout.splitlines()
    assert words[0] == "serve"
    assert f"run={moved}/delta" in words
    assert f"{moved}/exported/vllm/chat_template.jinja" in words
    assert words[-2:] == ["--port", "1"]


def test_serves_no_adapter_beside_another_base(lora: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(lora.path, tmp_path / "run", ignore=shutil.ignore_patterns("exported"))))
    facts = read_json(run.delta / "base.json")
    write_json(run.delta / "base.json", {**facts, "files": {}})
    run.mark("train", [run.delta])
    with pytest.raises(ProofError, match=r"was trained on another .*base, whose .* differs"):
        step.export(run, "vllm")
    assert not run.exported.exists()


def test_serves_merged_weights_and_names_what_vllm_would_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.trained(tmp_path, {"kind": "full", "lr": 1e-3})
    with pytest.raises(ProofError, match=r"vLLM would lose trained tensors of the model itself.*--to vllm:merged"):
        step.export(run, "vllm:lora")
    assert not run.exported.exists()
    with pytest.raises(RecipeError, match=r"--llama-cpp here: is for --to gguf and ollama; remove it for vllm"):
        step.export(run, "vllm", Path("here"))
    monkeypatch.setattr(step, "_merged", lambda run: run.merged)
    facts = step.export(run, "vllm")
    assert facts["command"].startswith('vllm serve "$run"/merged --served-model-name run --max-model-len 512')
    assert "of the delta itself, vLLM would lose trained tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("base.json", {"adapter": "ia3"}, "IA3 adapters"),
        ("base.json", {"adapter": "bottleneck"}, "bottleneck adapters"),
        ("base.json", {"adapter": "vera"}, "VeRA adapters"),
        ("base.json", {"added": {"ids": [7], "rows": 8}}, "embeddings of new tokens"),
        ("base.json", {"dequantized": "fp8"}, "stored in fp8"),
        ("adapter_config.json", {"use_dora": True}, "DoRA's magnitudes"),
        ("adapter_config.json", {"modules_to_save": ["lm_head"]}, r"whole copies of layers \(lm_head\)"),
        ("adapter_config.json", {"rank_pattern": {"q_proj": 2}}, "ranks or alphas of single layers"),
        ("adapter_config.json", {"target_parameters": ["experts.down_proj"]}, "experts that are one tensor"),
        ("adapter_config.json", {"init_lora_weights": "pissa"}, "a start of pissa"),
        ("adapter_config.json", {"r": 8}, "other ranks than the 8"),
    ],
)
def test_names_what_vllm_would_not_take_of_an_adapter(
    lora: Run, tmp_path: Path, file: str, change: dict[str, Any], words: str
) -> None:
    delta = shutil.copytree(lora.delta, tmp_path / "delta")
    write_json(delta / file, {**read_json(delta / file), **change})
    assert re.search(words, str(read_adapter(delta)), re.IGNORECASE)


def test_names_layers_that_few_models_of_vllm_take(lora: Run, tmp_path: Path) -> None:
    delta = shutil.copytree(lora.delta, tmp_path / "delta")
    tensors = load_file(delta / "adapter_model.safetensors")
    for layer, words in [
        ("lm_head.lora_A.weight", "embeddings or head"),
        ("model.embed_tokens.lora_embedding_A", "no LoRA of a linear layer"),
        ("model.layers.0.mlp.experts.3.up_proj.lora_A.weight", "LoRA of experts"),
    ]:
        save_file({**tensors, f"base_model.model.{layer}": torch.zeros(4, 8)}, delta / "adapter_model.safetensors")
        lost = read_adapter(delta)
        assert isinstance(lost, str)
        assert words in lost
