"""Recipes as text, and what is said of those that do not load."""

from pathlib import Path

import pytest

from llmtune import recipe
from llmtune.errors import RecipeError
from llmtune.plan.stages import Facts

FACTS = Facts(blocks=30, hidden=576, parameters=134_515_008)
GOOD = "model: {base: some/model}\ndata: {train: rows.jsonl}\nmethod: {kind: full}\n"
EVERYTHING = """
model: {base: a, revision: "0123456", quantize: 4bit, precision: bf16}
data: {train: a.jsonl, eval: b.jsonl, test: "Übung.jsonl", max_length: 64, overlength: error, overlap: warn}
method:
  kind: staged
  adapter: {kind: lora, targets: [q_proj, v_proj], alpha: 8}
  stages:
  - {until: 0.3, reach: 0, lr: 1.0e-05}
  - {until: 0.6, reach: 0.123456789, bottom_ratio: 0.3333333333333333}
  - {until: 1, reach: all, decay: 0.9}
train: {epochs: 1.5, max_steps: 7, weight_decay: 0, save_every: 1}
launch: {accelerate: multi_cpu, processes: 2}
eval: {suite: none, limit: 5}
merge: {enabled: false}
publish: {repo: me/my-model_1.0, weights: merged}
"""


def write(folder: Path, text: str | bytes) -> Path:
    """A recipe file."""
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def said(file: Path, *overrides: str) -> str:
    """The one line that loading a file ends in, with the folder taken out."""
    with pytest.raises(RecipeError) as caught:
        recipe.load(file, list(overrides))
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{file.parent}/", "")


def method(text: str) -> str:
    """A good recipe but for its method."""
    return GOOD.replace("{kind: full}", text)
