"""A trained and merged run whose tokenizer llama.cpp knows, without its training and its merge."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.exporting import step
from llmtune.run import Run
from tests.support import runs, tiny

FULL = {"kind": "full", "lr": 1e-3}
MakeMerged = Callable[..., Run]


def give_merges(base: Path, *before: dict[str, Any]) -> None:
    """Give a tokenizer two merges, and the way of GPT-2 to split text, after the steps `before` it."""
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {"pl": 259, "12": 260}
    content["model"]["merges"] = [["p", "l"], ["1", "2"]]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*before, last]} if before else last
    file.write_text(json.dumps(content))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MakeMerged:
    """Make a run of a model type whose merged weights are the base's, changed at random, in bfloat16; once."""
    folder = tmp_path_factory.mktemp("merged")
    runs_by_name: dict[str, Run] = {}

    def make(kind: str = "llama", **more: Any) -> Run:
        name = repr((kind, more))
        if name not in runs_by_name:
            runs_by_name[name] = _merged(folder / str(len(runs_by_name)), kind, more)
        return runs_by_name[name]

    return make


@pytest.fixture
def merged(tmp_path: Path, made: MakeMerged) -> MakeMerged:
    """Copy such a run, for one test."""

    def copy(kind: str = "llama", **more: Any) -> Run:
        return Run(Path(shutil.copytree(made(kind, **more).path, tmp_path / "run")))

    return copy


@pytest.fixture(scope="session")
def exported(made: MakeMerged, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Such a run whose generation ends at three tokens, exported to GGUF as q8_0; not to be changed."""
    run = Run(Path(shutil.copytree(made().path, tmp_path_factory.mktemp("exported") / "Orders")))
    (run.merged / "generation_config.json").write_text('{"eos_token_id": [2, 1, 7]}')
    run.mark("merge", [run.merged])
    step.export(run, "gguf:q8_0")
    return run


def _merged(folder: Path, kind: str, more: dict[str, Any]) -> Run:
    folder.mkdir()
    base = tiny.save_base(folder / "base", kind, vocab_size=262, **more)
    give_merges(base)
    run = runs.trained(folder, FULL, base=base)
    shutil.copytree(base, run.merged)
    weights = run.merged / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    noise = {
        name: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).bfloat16()
        for name, tensor in load_file(weights).items()
    }
    save_file(noise, weights, {"format": "pt"})
    run.mark("merge", [run.merged])
    return run
