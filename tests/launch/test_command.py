"""Launching: which config, how many processes, which command and environment a recipe and a machine give."""

import json
import os
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from llmtune import recipe
from llmtune.errors import FieldError, MachineError, RecipeError
from llmtune.files import shipped_folder
from llmtune.launch import process
from llmtune.launch.command import (
    WORLD,
    choose_config,
    config_file,
    count_processes,
    read_config,
    training_environment,
    training_process,
)
from llmtune.launch.ending import Exit, training_error
from llmtune.launch.process import train_in_children
from llmtune.machine.gpus import VISIBLE, Gpus
from llmtune.machine.memory import TUNABLES, UNCACHED
from llmtune.recipe.sections import Launch
from llmtune.recipe.standing import with_absolute_config
from llmtune.run import Run
from tests.support.recipes import GOOD, write

NAMES = [name for name in get_args(get_args(Launch.model_fields["accelerate"].annotation)[0]) if name != "auto"]
ARGUMENTS = ["some recipe.yaml", "--out=runs/x"]
ALONE = ("cpu", "single_gpu")


def section(accelerate: str, processes: int | None = None) -> Launch:
    """The launch section of a recipe."""
    return Launch.model_validate({"accelerate": accelerate, "processes": processes})


def test_names_every_accelerate_config() -> None:
    assert sorted(file.stem for file in shipped_folder("accelerate_configs").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_loads_every_config(name: str) -> None:
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
    ("accelerate", "processes", "gpus", "name", "count"),
    [
        ("auto", None, 0, "cpu", 1),
        ("auto", None, 1, "single_gpu", 1),
        ("auto", None, 4, "ddp", 4),
        ("auto", 1, 0, "cpu", 1),
        ("auto", 3, 0, "multi_cpu", 3),
        ("auto", 1, 4, "single_gpu", 1),
        ("auto", 2, 4, "ddp", 2),
        ("cpu", None, 4, "cpu", 1),
        ("multi_cpu", None, 0, "multi_cpu", 2),
        ("multi_cpu", None, 8, "multi_cpu", 2),
        ("multi_cpu", 4, 0, "multi_cpu", 4),
        ("ddp", None, 8, "ddp", 8),
        ("fsdp2", None, 4, "fsdp2", 4),
        ("fsdp2", None, 0, "fsdp2", 1),
        ("multi_node", None, 8, "multi_node", 16),
    ],
)
def test_chooses_config_and_processes_by_recipe_and_machine(
    accelerate: str, processes: int | None, gpus: int, name: str, count: int
) -> None:
    launch = section(accelerate, processes)
    assert choose_config(launch, gpus) == name
    assert count_processes(launch, name, gpus) == count


def test_takes_a_config_of_the_users_beside_the_recipe_or_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        config_file("ddp").read_text().replace("processes: 2", "processes: 3")
    )
    (tmp_path / "here.yml").write_text(config_file("cpu").read_text())
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "recipes", GOOD + "launch: {accelerate: mine.yaml}\n")
    launch = recipe.load(Path("recipes") / file.name).launch
    own = str(tmp_path / "recipes" / "mine.yaml")
    assert with_absolute_config(launch).accelerate == own
    words = training_process(launch, ARGUMENTS, Gpus(3), cores=2).arguments
    assert words[words.index("--config_file") + 1] == own
    assert words[words.index("--num_processes") + 1] == "3"
    assert count_processes(launch.model_copy(update={"processes": 2}), launch.accelerate, 8) == 2
    other = recipe.load(file, ["launch.accelerate=here.yml"]).launch
    assert training_process(other, ARGUMENTS, Gpus(0), cores=2).environment["ACCELERATE_USE_CPU"] == "True"


def test_refuses_a_config_of_the_users_that_is_missing_or_lacks_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, GOOD + "launch:\n  accelerate: mine.yaml\n")

    def refusal(text: str | None) -> str:
        if text is not None:
            (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(RecipeError) as caught:
            train_in_children(recipe.load(file), Run(tmp_path / "run"), ARGUMENTS)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(f"{tmp_path}/", "")

    monkeypatch.chdir(tmp_path)
    assert refusal(None) == "recipe.yaml:5: launch.accelerate: no such file: mine.yaml"
    full = config_file("cpu").read_text()
    for key, kind in (("distributed_type", "text"), ("num_processes", "a whole number"), ("mixed_precision", "text")):
        lines = [line for line in full.splitlines() if not line.startswith(key)]
        message = f"recipe.yaml:5: launch.accelerate: mine.yaml needs {key}, {kind}; `accelerate config --config_file"
        assert refusal("\n".join(lines)).startswith(message)
    assert refusal("num_machines: [").startswith("mine.yaml:1: not YAML")
    (tmp_path / "mine.yaml").rename(tmp_path / "mien.yaml")
    assert refusal(None).endswith("no such file: mine.yaml; did you mean 'mien.yaml'?")


@pytest.mark.parametrize("name", ALONE)
def test_refuses_several_processes_of_a_config_that_runs_one(name: str) -> None:
    with pytest.raises(
        FieldError, match=f"launch.processes: {name} runs one process, not 2; try accelerate: multi_cpu"
    ):
        count_processes(section(name, 2), name, 2)


def test_names_the_recipe_line_of_a_wrong_number_of_processes(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, GOOD + "launch:\n  accelerate: cpu\n  processes: 2\n"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:6: launch\.processes: cpu runs one process, not 2"):
        train_in_children(loaded, Run(tmp_path / "run"), ARGUMENTS)


@pytest.mark.parametrize(
    ("accelerate", "processes", "gpus", "words"),
    [
        ("ddp", None, 0, "ddp needs 1 GPU and this machine has 0; try cpu or multi_cpu"),
        ("ddp", 4, 2, "ddp needs 4 GPUs and this machine has 2; try auto"),
        ("fsdp2", None, 1, "fsdp2 shards over several GPUs and would find one; try single_gpu, or auto"),
        ("fsdp2", 1, 4, "fsdp2 shards over several GPUs and would find one"),
        ("single_gpu", None, 0, "single_gpu needs 1 GPU and this machine has 0; try cpu or multi_cpu"),
    ],
)
def test_refuses_a_machine_with_too_few_gpus(accelerate: str, processes: int | None, gpus: int, words: str) -> None:
    with pytest.raises(MachineError, match=words) as caught:
        training_process(section(accelerate, processes), ARGUMENTS, Gpus(gpus), cores=2)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ALONE)
def test_starts_one_process_as_accelerate_would(name: str) -> None:
    training = training_process(section(name), ARGUMENTS, Gpus(1), cores=2)
    options = ["--config_file", str(config_file(name)), "-m", "llmtune.train", *ARGUMENTS]
    parsed = _validate_launch_command(launch_command_parser().parse_args(options))[0]
    command, variables = prepare_simple_launcher_cmd_env(parsed)
    assert training.arguments == command
    assert not training.launcher
    added = {key: value for key, value in variables.items() if key not in os.environ and "DYNAMO" not in key}
    openmp = {"OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME"}
    env = training.environment
    assert {key: value for key, value in env.items() if key in added} == {
        key: value for key, value in added.items() if key not in openmp
    } | {key: env[key] for key in openmp & set(added) & set(env)}
    assert variables["ACCELERATE_DYNAMO_BACKEND"] == "NO"


@pytest.mark.parametrize(
    ("accelerate", "processes", "gpus", "visible", "seen"),
    [
        ("single_gpu", None, 2, None, "0"),
        ("single_gpu", None, 2, "3,1", "3"),
        ("auto", 1, 4, None, "0"),
        ("auto", None, 1, "GPU-8f,GPU-9a", "GPU-8f"),
        ("ddp", 1, 2, None, "0"),
        ("ddp", None, 2, "3,1", "3,1"),
        ("ddp", None, 2, None, None),
        ("fsdp2", None, 2, None, None),
        ("cpu", None, 2, None, ""),
        ("cpu", None, 2, "0,1", ""),
        ("multi_cpu", None, 2, "0", ""),
        ("auto", None, 0, None, ""),
        ("auto", 2, 0, "7", ""),
        ("own.yaml", None, 2, "0", "1"),
    ],
)
def test_processes_see_the_gpus_of_their_launch_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accelerate: str,
    processes: int | None,
    gpus: int,
    visible: str | None,
    seen: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(config_file("single_gpu").read_text() + 'gpu_ids: "1"\n')
    monkeypatch.delenv(VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    environment = training_process(section(accelerate, processes), ARGUMENTS, Gpus(gpus), cores=2).environment
    assert environment.get(VISIBLE) == seen


def test_a_cpu_run_on_a_gpu_machine_has_the_cpus_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", TUNABLES):
        monkeypatch.delenv(name, raising=False)
    on_cpu = training_process(section("cpu"), ARGUMENTS, Gpus(2), cores=2).environment
    assert on_cpu[TUNABLES] == UNCACHED
    assert "PYTORCH_ALLOC_CONF" not in on_cpu
    for launch in (section("single_gpu"), section("ddp")):
        on_gpu = training_process(launch, ARGUMENTS, Gpus(2), cores=2).environment
        assert on_gpu["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert TUNABLES not in on_gpu


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_users_own_allocator_settings_stand(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    environment = training_process(section("single_gpu"), ARGUMENTS, Gpus(1), cores=2).environment
    assert {key: value for key, value in environment.items() if key.startswith("PYTORCH_")} == {
        name: "max_split_size_mb:64"
    }


def test_a_gpu_that_torch_cannot_use_ends_a_gpu_launch_and_not_auto(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = "torch 2.13.0 is built for CUDA 13.0 and finds no GPU that it can use with the NVIDIA driver 535.104"
    with pytest.raises(MachineError) as caught:
        training_process(section("ddp", 2), ARGUMENTS, Gpus(0, fault), cores=2)
    assert caught.value.exit_code == 3
    assert str(caught.value) == f"launch.accelerate: ddp needs 2 GPUs and torch can use 0: {fault}"
    started: dict[str, str] = {}

    def execute(words: list[str], env: dict[str, str], launcher: bool) -> Exit:
        started.update(env)
        return Exit(0)

    monkeypatch.setattr(process, "find_gpus", lambda: Gpus(0, fault))
    monkeypatch.setattr(process, "execute", execute)
    process.run_training(section("auto"), ARGUMENTS)
    assert started["ACCELERATE_USE_CPU"] == "True"
    assert capsys.readouterr().out == f"launch: {fault}; going on with the CPU\n"


@pytest.mark.parametrize("own", [False, True])
def test_refuses_to_start_several_machines_and_says_how(tmp_path: Path, own: bool) -> None:
    text = config_file("multi_node").read_text().replace("127.0.0.1", "10.0.0.7")
    (tmp_path / "two.yaml").write_text(text)
    launch = section(str(tmp_path / "two.yaml") if own else "multi_node")
    with pytest.raises(FieldError) as caught:
        training_process(launch, ARGUMENTS, Gpus(8), cores=2)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "is for 2 machines, and this command starts one; on each, run llmtune launch RECIPE --rank RANK" in message
    assert "RUN on a disk that all share" in message
    assert "--slurm writes a job" in message


@pytest.mark.parametrize("name", sorted({*NAMES} - {*ALONE, "multi_node"}))
def test_command_names_config_and_number_of_processes(name: str) -> None:
    launch = section(name)
    training = training_process(launch, ARGUMENTS, Gpus(8), cores=8)
    words = training.arguments
    assert training.launcher
    assert words[:3] == [sys.executable, "-m", "llmtune.launch.accelerate_entry"]
    assert words[words.index("--config_file") + 1] == str(config_file(name))
    assert words[words.index("--num_processes") + 1] == str(count_processes(launch, name, 8))
    assert words[-4:] == ["-m", "llmtune.train", *ARGUMENTS]


def test_environment_shares_out_cores_and_keeps_the_users_values(monkeypatch: pytest.MonkeyPatch) -> None:
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
    ("result", "started", "code", "message"),
    [
        (Exit(4, "the loss is not finite"), True, 4, "the loss is not finite"),
        (Exit(5, "a proof failed"), True, 5, "a proof failed"),
        (Exit(1), True, 4, "the training process ended with code 1; continue with: llmtune run "),
        (Exit(130), True, 130, "stopped; continue with: llmtune run "),
        (Exit(143), False, 143, "stopped; nothing was trained yet"),
        (Exit(130, "stopped at step 3"), True, 130, "stopped at step 3"),
        (Exit(137), True, 3, "the training process was killed (signal 9), probably by the system for lack of memory"),
        (Exit(139), True, 4, "the training process crashed (signal 11, SIGSEGV); continue with: llmtune run "),
        (Exit(135), True, 4, "the training process crashed (signal 7, SIGBUS); continue with: llmtune run "),
        (Exit(134), False, 4, "the training process crashed (signal 6, SIGABRT); nothing was trained yet"),
    ],
)
def test_raises_the_trainings_error_with_its_message_and_code(
    tmp_path: Path, result: Exit, started: bool, code: int, message: str
) -> None:
    run = Run(tmp_path)
    if started:
        run.recipe_file.touch()
    error = training_error(result, run)
    assert error.exit_code == code
    assert str(error).startswith(message)


def test_killed_training_names_memory_settings_and_what_is_safe(tmp_path: Path) -> None:
    settings = recipe.load(write(tmp_path, GOOD + "train:\n  activation_checkpointing: true\n"))
    run = Run(tmp_path / "run")
    for step in (3, 12, 15):
        (run.checkpoints / f"step-{step:06d}").mkdir(parents=True)
    manifest = json.dumps({"weights": {"bytes": 5, "sha256": ""}})
    for step, content in ((3, "whole"), (12, "cut")):
        (run.checkpoints / f"step-{step:06d}" / "manifest.json").write_text(manifest)
        (run.checkpoints / f"step-{step:06d}" / "weights").write_text(content)
    run.recipe_file.touch()
    message = str(training_error(Exit(137), run, settings))
    assert "this machine has" in message
    assert "lower it in a new run by train.micro_batch_size: 1, a lower data.max_length (now" in message
    assert message.endswith(f"; training is safe up to step 3; continue with: llmtune run {run.path}")
