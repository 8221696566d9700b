"""Launch configs that llmtune cannot follow are refused by name when a recipe is read or checked."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtune import cli, recipe
from llmtune.errors import FieldError, RecipeError
from llmtune.launch.command import config_file, read_config
from llmtune.launch.engine import check_config
from llmtune.training.distributed import join_processes
from tests.support import tiny
from tests.support.recipes import GOOD, write

FSDP = yaml.safe_load(config_file("fsdp2").read_text())


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_refuses_deepspeeds_names_when_a_recipe_is_read(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, GOOD + f"launch:\n  accelerate: {name}\n")
    with pytest.raises(RecipeError) as caught:
        recipe.load(file)
    line = f"recipe.yaml:5: launch.accelerate: {name} is a config of DeepSpeed, which cannot follow a plan; try fsdp2"
    assert str(caught.value).endswith(line)
    assert caught.value.exit_code == 2


def test_training_by_hand_refuses_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(FieldError, match="started with is a config of DeepSpeed"):
        join_processes()


@pytest.mark.parametrize(("kind", "words"), [("DEEPSPEED", "DeepSpeed"), ("TPU", "'TPU' is not supported; try one of")])
def test_refuses_another_engine_in_a_config_of_the_users(tmp_path: Path, kind: str, words: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(config_file("ddp").read_text()), "distributed_type": kind}))
    with pytest.raises(FieldError, match=words):
        read_config(str(file))


@pytest.mark.parametrize(
    ("keys", "optimizer", "words"),
    [
        ({}, "adamw", None),
        ({}, "sgd", None),
        ({}, "adafactor", "adafactor cannot hold its state sharded under fsdp2"),
        ({"fsdp_version": 1}, "adamw", "FSDP1 is not supported"),
        ({"fsdp_version": None}, "adamw", "FSDP1 is not supported"),
        ({"fsdp_cpu_ram_efficient_loading": True}, "adamw", "every process reads the base"),
        ({"fsdp_cpu_ram_efficient_loading": None}, "adamw", "every process reads the base"),
        ({"fsdp_activation_checkpointing": True}, "adamw", "train.activation_checkpointing to true"),
    ],
)
def test_checks_the_settings_of_a_sharding_config(keys: dict[str, Any], optimizer: str, words: str | None) -> None:
    """A key that is None is left out: accelerate's default counts."""
    settings = {key: value for key, value in {**FSDP["fsdp_config"], **keys}.items() if value is not None}
    if words is None:
        check_config({**FSDP, "fsdp_config": settings}, optimizer)
        return
    with pytest.raises(FieldError, match=words):
        check_config({**FSDP, "fsdp_config": settings}, optimizer)


def test_check_refuses_what_a_users_sharding_config_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_base(tmp_path / "base", blocks=1)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(20))
    own = tmp_path / "own.yaml"
    own.write_text(config_file("fsdp2").read_text())
    sections: dict[str, Any] = {"train": {"optimizer": "adafactor"}, "launch": {"accelerate": str(own)}}
    file = tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", data, {"kind": "full"}, **sections)
    for command in ("check", "plan"):
        assert cli.main([command, str(file)]) == 2
        assert "train.optimizer: adafactor cannot hold its state sharded" in capsys.readouterr().err
