"""Recipe and machine -> the launch: which config, how many processes, which command and environment."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from llmtune import recipe
from llmtune.errors import LlmtuneError, MachineError, RecipeError
from llmtune.files import shipped_folder
from llmtune.launch import command as command_module
from llmtune.launch import process
from llmtune.launch.command import (
    TUNABLES,
    UNCACHED,
    WORLD,
    choose_config,
    config_file,
    count_gpus,
    count_processes,
    read_config,
    training_command,
    training_environment,
)
from llmtune.launch.process import Ended, run_training, train_in_children
from llmtune.recipe.sections import Launch, Recipe
from llmtune.run import Run

NAMES = [name for name in get_args(Launch.model_fields["accelerate"].annotation) if name != "auto"]
WORDS = ["some recipe.yaml", "--out=runs/x"]
ALONE = ("cpu", "single_gpu")


def settings(folder: Path, *overrides: str) -> Recipe:
    """A recipe from a file."""
    file = folder / "recipe.yaml"
    file.write_text("model: {base: a/b}\ndata: {train: rows.jsonl}\nmethod: {kind: full}\n")
    return recipe.load(file, list(overrides))


def test_every_accelerate_config_has_a_name_and_every_name_a_config() -> None:
    assert sorted(file.stem for file in shipped_folder("accelerate_configs").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_accelerate_config_is_plain_data_that_accelerate_takes(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = config_file(name)
    values = yaml.safe_load(file.read_text())
    assert read_config(name) == values
    loaded = load_config_from_file(str(file))
    assert loaded.num_processes == values["num_processes"] >= values["num_machines"]
    assert file.read_text().startswith("# ")
    if values["distributed_type"] != "NO" and values["num_machines"] == 1:
        assert values["main_process_port"] == 0, "two runs at once would want one port"


@pytest.mark.parametrize(
    ("overrides", "gpus", "name", "count"),
    [
        ((), 0, "cpu", 1),
        ((), 1, "single_gpu", 1),
        ((), 4, "ddp", 4),
        (("launch.processes=1",), 0, "cpu", 1),
        (("launch.processes=3",), 0, "multi_cpu", 3),
        (("launch.processes=1",), 4, "single_gpu", 1),
        (("launch.processes=2",), 4, "ddp", 2),
        (("launch.accelerate=cpu",), 4, "cpu", 1),
        (("launch.accelerate=multi_cpu",), 0, "multi_cpu", 2),
        (("launch.accelerate=multi_cpu",), 8, "multi_cpu", 2),
        (("launch.accelerate=multi_cpu", "launch.processes=4"), 0, "multi_cpu", 4),
        (("launch.accelerate=ddp",), 8, "ddp", 8),
        (("launch.accelerate=fsdp2",), 4, "fsdp2", 4),
        (("launch.accelerate=fsdp2",), 0, "fsdp2", 1),
        (("launch.accelerate=zero3", "launch.processes=2"), 4, "zero3", 2),
        (("launch.accelerate=multi_node",), 8, "multi_node", 16),
    ],
)
def test_the_config_and_the_number_of_processes_follow_recipe_and_machine(
    tmp_path: Path, overrides: tuple[str, ...], gpus: int, name: str, count: int
) -> None:
    asked = settings(tmp_path, *overrides)
    assert choose_config(asked, gpus) == name
    assert count_processes(asked, name, gpus) == count


@pytest.mark.parametrize("name", ALONE)
def test_several_processes_of_a_config_that_runs_one_are_refused(tmp_path: Path, name: str) -> None:
    asked = settings(tmp_path, f"launch.accelerate={name}", "launch.processes=2")
    with pytest.raises(RecipeError, match=f"launch.processes: {name} runs one process, not 2; multi_cpu or ddp"):
        count_processes(asked, name, 2)


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        (("launch.accelerate=ddp",), 0, "ddp needs 1 GPUs and this machine has 0; cpu and multi_cpu need none"),
        (("launch.accelerate=ddp", "launch.processes=4"), 2, "ddp needs 4 GPUs and this machine has 2; auto takes"),
        (("launch.accelerate=multi_node", "launch.processes=16"), 4, "multi_node needs 8 GPUs and this machine has 4"),
    ],
)
def test_a_machine_with_too_few_gpus_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], gpus: int, words: str
) -> None:
    with pytest.raises(MachineError, match=words) as caught:
        training_command(settings(tmp_path, *overrides), WORDS, gpus)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ALONE)
def test_one_process_is_started_as_accelerate_would_start_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(tmp_path, f"launch.accelerate={name}")
    started: list[tuple[list[str], dict[str, str], bool]] = []
    monkeypatch.setattr(process, "count_gpus", lambda: 1)
    monkeypatch.setattr(process, "execute", lambda words, env, launcher: started.append((words, env, launcher)))
    run_training(asked, WORDS)
    words, env, launcher = started[0]
    given = ["--config_file", str(config_file(name)), "-m", "llmtune.train", *WORDS]
    arguments = _validate_launch_command(launch_command_parser().parse_args(given))[0]
    theirs, variables = prepare_simple_launcher_cmd_env(arguments)
    assert words == theirs
    assert not launcher
    told = {key: value for key, value in variables.items() if key not in os.environ and "DYNAMO" not in key}
    asked_of_openmp = {"OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME"}
    assert {key: value for key, value in env.items() if key in told} == {
        key: value for key, value in told.items() if key not in asked_of_openmp
    } | {key: env[key] for key in asked_of_openmp & set(told) & set(env)}
    assert variables["ACCELERATE_DYNAMO_BACKEND"] == "NO"


def test_a_machine_without_the_device_file_of_a_gpu_is_not_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        "from llmtune.launch.command import count_gpus; print(count_gpus()); import sys; print('torch' in sys.modules)"
    )
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
        assert said.split() == ["0", "False"]
    monkeypatch.setattr(command_module, "_GPU_FILES", ("null",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert count_gpus() == 3


@pytest.mark.parametrize("name", sorted({*NAMES} - {*ALONE}))
def test_the_command_of_several_processes_names_its_config_and_their_number(tmp_path: Path, name: str) -> None:
    asked = settings(tmp_path, f"launch.accelerate={name}")
    words = training_command(asked, WORDS, 8)
    assert words[:3] == [sys.executable, "-m", "llmtune.launch.accelerate_entry"]
    assert words[words.index("--config_file") + 1] == str(config_file(name))
    assert words[words.index("--num_processes") + 1] == str(count_processes(asked, name, 8))
    assert words[-4:] == ["-m", "llmtune.train", *WORDS]
    assert training_command(asked, WORDS, 8) == words


def test_the_environment_shares_cores_out_and_leaves_the_users_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "USE_HUB_KERNELS", WORLD, TUNABLES):
        monkeypatch.delenv(name, raising=False)
    assert [training_environment(count, 8)["OMP_NUM_THREADS"] for count in (1, 2, 3, 16)] == ["8", "4", "2", "1"]
    assert training_environment(2, 8)["USE_HUB_KERNELS"] == "NO"
    assert training_environment(2, 8)[WORLD] == "2"
    assert training_environment(1, 8)[TUNABLES] == UNCACHED
    assert TUNABLES not in training_environment(1, 8, gpus=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv(TUNABLES, "")
    monkeypatch.setenv(WORLD, "9")
    monkeypatch.setenv("MINE", "kept")
    child = training_environment(2, 8)
    assert (child["OMP_NUM_THREADS"], child["MINE"], child[WORLD]) == ("5", "kept", "2")
    assert child[TUNABLES] == ""


@pytest.mark.parametrize(
    ("ended", "made", "code", "said"),
    [
        (Ended(4, "the loss is not finite"), True, 4, "the loss is not finite"),
        (Ended(5, "a proof failed"), True, 5, "a proof failed"),
        (Ended(1), True, 4, "training ended with code 1; go on with: llmtune run "),
        (Ended(130), True, 130, "stopped; go on with: llmtune run "),
        (Ended(143), False, 143, "stopped; nothing was trained yet"),
        (Ended(130, "stopped at step 3"), True, 130, "stopped at step 3"),
    ],
)
def test_an_early_end_is_one_error_with_the_trainings_own_words_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended, made: bool, code: int, said: str
) -> None:
    asked = settings(tmp_path)
    monkeypatch.setattr(process, "run_training", lambda *_: ended)
    with pytest.raises(LlmtuneError) as caught:
        train_in_children(asked, Run(tmp_path if made else tmp_path / "nowhere"), WORDS)
    assert caught.value.exit_code == code
    assert str(caught.value).startswith(said)
