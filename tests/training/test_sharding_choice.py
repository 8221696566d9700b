"""auto shards over several GPUs where one is too small for the states; check, plan and run say and do the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune import cli, recipe
from llmtune.api import job
from llmtune.launch import process
from llmtune.launch.ending import Exit
from llmtune.launch.engine import needs_sharding
from llmtune.recipe.sections import Launch
from llmtune.training import prepare
from tests.support import tiny

LORA = {"kind": "full", "adapter": "lora"}


def recipe_file(folder: Path, **sections: Any) -> Path:
    """A recipe on a tiny base of one block, whose weights and states take some 500 kB."""
    if not (folder / "base").exists():
        tiny.save_base(folder / "base", blocks=1)
        tiny.write_rows(folder / "train.jsonl", tiny.sums(20))
    method = sections.pop("method", {"kind": "full"})
    return tiny.write_recipe(folder / "r.yaml", folder / "base", folder / "train.jsonl", method, **sections)


def has_gpus(monkeypatch: pytest.MonkeyPatch, count: int, memory: int) -> None:
    """Let this machine have GPUs of so many bytes."""
    monkeypatch.setattr("llmtune.machine.gpus.count_gpus", lambda: count)
    monkeypatch.setattr(job, "count_gpus", lambda: count)
    monkeypatch.setattr(prepare, "smallest_gpu", lambda: memory)


def started(monkeypatch: pytest.MonkeyPatch, file: Path, out: Path) -> str:
    """The accelerate config that `llmtune train` starts."""
    launches: list[Launch] = []

    def run_training(launch: Launch, arguments: list[str]) -> Exit:
        launches.append(launch)
        return Exit(1)

    monkeypatch.setattr(process, "run_training", run_training)
    assert cli.main(["train", str(file), "--out", str(out)]) == 4
    return str(launches[0].accelerate)


@pytest.mark.parametrize(
    ("count", "memory", "sections", "config"),
    [
        (2, 10**5, {}, "fsdp2"),
        (2, 10**9, {}, "auto"),
        (1, 10**5, {}, "auto"),
        (2, 10**5, {"launch": {"processes": 1}}, "auto"),
        (2, 10**5, {"launch": {"accelerate": "ddp"}}, "ddp"),
        (2, 10**5, {"train": {"optimizer": "adafactor"}}, "auto"),
        (2, 10**5, {"method": LORA, "model": {"quantize": "4bit"}}, "auto"),
    ],
)
@pytest.mark.slow
def test_check_plan_and_run_agree_on_sharding(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: int,
    memory: int,
    sections: dict[str, Any],
    config: str,
) -> None:
    has_gpus(monkeypatch, count, memory)
    if "model" in sections:
        sections = {**sections, "model": {**sections["model"], "base": str(tmp_path / "base")}}
    file = recipe_file(tmp_path, **sections)
    line = "launch: fsdp2, which shards the model: weights, gradients and optimizer states take"
    for command in ("check", "plan"):
        assert cli.main([command, str(file), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        notes = (answer["plan"] if command == "check" else answer)["notes"]
        assert any(note.startswith(line) for note in notes) == (config == "fsdp2"), command
        assert ("gathered weights" in answer["memory"]["stages"][0]) == (config == "fsdp2"), command
    assert started(monkeypatch, file, tmp_path / "run") == config
    assert (line in capsys.readouterr().out) == (config == "fsdp2")


def test_a_gpu_that_the_states_nearly_fill_is_too_small(tmp_path: Path) -> None:
    settings = recipe.load(recipe_file(tmp_path))
    assert [needs_sharding(settings, states, 100) for states in (80, 90, 91, 100, 200)] == [False, False, *[True] * 3]
