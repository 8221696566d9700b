"""SmolLM2-135M: every shipped recipe for it trains, and one run goes through every step."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from llmtune import recipe
from llmtune.adapters.delta import load_delta
from llmtune.model.base import Base, load_model
from llmtune.model.files.locate import locate_base
from llmtune.run import open_run
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from tests.support import ROOT

RECIPES = sorted((ROOT / "recipes" / "smollm2-135m").glob("*.yaml"))
FEW = ["train.max_steps=3", "train.batch_size=2", "train.save_every=1.0", "memory.frozen_blocks=recompute"]
IDS = torch.arange(100, 120)[None]

pytestmark = pytest.mark.slow


@pytest.fixture
def few_rows(tmp_path: Path) -> list[str]:
    """Overrides that replace the sample by a few of its rows."""
    names = {"train": ("train", 12), "eval": ("validation", 2), "test": ("test", 4)}
    overrides = []
    for part, (name, count) in names.items():
        lines = (ROOT / "llmtune" / "sample" / f"{name}.jsonl").read_text().splitlines()[:count]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        overrides.append(f"data.{part}={tmp_path / name}.jsonl")
    return overrides


def test_ships_a_recipe_for_every_method() -> None:
    names = {file.stem for file in RECIPES}
    assert names >= {
        "full",
        "frozen",
        "gradual",
        "discriminative",
        "ulmfit",
        "lora",
        "dora",
        "qlora",
        "vera",
        "staged-lora",
        "lisa",
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_trains_a_few_steps_with_every_recipe(tmp_path: Path, few_rows: list[str], file: Path) -> None:
    loaded = recipe.load(file, [*few_rows, *FEW])
    run = prepare(loaded, tmp_path / "run", gpus=0)
    train(run)
    losses = [json.loads(line)["loss"] for line in run.log_file.read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 3
    assert all(0 < loss < 6 for loss in losses)
    base = locate_base(run.recipe().model)
    with torch.no_grad():
        after = load_delta(load_model(base), run.delta)(IDS).logits
    assert not torch.equal(base_logits(base.folder), after)


@cache
def base_logits(folder: Path) -> torch.Tensor:
    """What the base in a folder says of a few tokens."""
    with torch.no_grad():
        logits: torch.Tensor = load_model(Base(folder, "base", None, None))(IDS).logits
    return logits


def test_runs_all_the_way(tmp_path: Path, few_rows: list[str]) -> None:
    overrides = [*few_rows, *FEW, "eval.shots=1"]
    command = [sys.executable, "-m", "llmtune", "run", str(ROOT / "recipes" / "quickstart.yaml")]
    command += ["--out", str(tmp_path / "run"), *(part for override in overrides for part in ("--set", override))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    run = open_run(tmp_path / "run")
    assert all(run.done(step) for step in ("train", "eval", "merge", "report"))
    assert "base, 1-shot" in result.stdout
    assert "largest logit gap" in result.stdout
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], add_generation_prompt=True,"
        " return_tensors='pt', return_dict=True)\n"
        "assert model.generate(**ids, max_new_tokens=2).shape[1] > ids['input_ids'].shape[1]\n"
    )
    subprocess.run([sys.executable, "-c", script, str(run.merged)], cwd=tmp_path, check=True)
