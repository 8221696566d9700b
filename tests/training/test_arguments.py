"""Every argument of transformers' Trainer is kept with a run, and a default that changed is seen."""

import json
from pathlib import Path

from llmtune.training.arguments import ARGUMENTS, OPTIMIZERS
from llmtune.training.loop import train
from tests.support.training import METHODS, prepare_run
from tests.support.versions import installed_as_pinned

GOLDEN = Path(__file__).parent / "arguments.json"
OURS = {"max_steps", "save_steps", "eval_steps", "use_cpu", "bf16", "fp16", "dataloader_pin_memory", "passes"}
"""Arguments that follow from the recipe or the machine."""


def test_keeps_every_argument_and_knows_every_default(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, METHODS["full"])
    train(run)
    kept = json.loads((run.path / ARGUMENTS).read_text())
    assert str(tmp_path) not in json.dumps(kept)
    golden = json.loads(GOLDEN.read_text())
    changed = {key for key in kept.keys() | golden.keys() if kept.get(key) != golden.get(key)}
    if not installed_as_pinned("transformers"):
        changed -= kept.keys() ^ golden.keys()  # another version has other arguments
    assert changed <= OURS, f"other arguments than tests/training/arguments.json knows: {sorted(changed - OURS)}"
    assert kept.keys() == golden.keys() or not installed_as_pinned("transformers")


def test_golden_arguments_are_the_recipes() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["optim"] == OPTIMIZERS["adamw"]
    assert golden["average_tokens_across_devices"] is True
    assert golden["logging_nan_inf_filter"] is False
