"""train(run) from end to end on a tiny base: what it leaves, how it goes on, how it is launched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from llmtune import recipe
from llmtune.adapters.delta import TENSORS, load_delta
from llmtune.errors import MachineError, RecipeError, TrainingError
from llmtune.files import fingerprint, read_json
from llmtune.launch.command import WORLD, config_file
from llmtune.machine.energy import cpu_name
from llmtune.machine.memory import PRIMITIVES
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from llmtune.run import Run
from llmtune.run_log import read_log
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from llmtune.training.stages.states import OPTIMIZER
from tests.support import ROOT, tiny
from tests.support.training import GRADUAL, prepare_run


@pytest.mark.parametrize("adapter", ["none", {"kind": "lora", "rank": 4}], ids=["none", "lora"])
@pytest.mark.slow
def test_leaves_the_delta_log_and_manifest_as_promised(
    tmp_path: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PRIMITIVES:
        monkeypatch.setenv(name, "")
        os.environ.pop(name)
    run = prepare_run(tmp_path, GRADUAL | {"adapter": adapter}, train={"epochs": 4, "batch_size": 4})
    train(run)
    assert PRIMITIVES.items() <= os.environ.items()
    assert run.done("train")
    plan = read_json(run.plan_file)
    log = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, plan["steps"] + 1))
    assert steps[-1]["supervised"] == 4 * read_json(run.data_file)["supervised_tokens"]["total"]
    assert not [entry for entry in log if "warning" in entry]
    assert {"tokens_per_s", "seconds", "peak_memory_mb", "grad_norm"} <= set(steps[0])
    assert [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1] < steps[0]["loss"]
    hardware = log[-1]["measured"]
    assert (log[-1]["step"], hardware["from"], hardware["devices"]) == (plan["steps"], 0, {cpu_name(): 1})
    file = next(run.delta.glob("*.safetensors"))
    stored = load_file(file)
    assert sum(tensor.numel() for tensor in stored.values()) == plan["trained"]
    assert 4 * plan["trained"] == plan["delta_bytes"]
    assert run.manifest()["steps"]["train"]["files"][f"delta/{file.name}"] == fingerprint(file)
    base = locate_base(run.recipe().model)
    load_delta(load_model(base), run.delta)
    assert not list(run.checkpoints.glob(".*"))


def test_repeats_the_plan_from_the_resolved_recipe(tmp_path: Path) -> None:
    method = {"kind": "gradual", "reaches": [1, 2, "all"], "bottom_ratio": 0.1}
    first = prepare_run(tmp_path, method)
    again = prepare(recipe.load(first.recipe_file), tmp_path / "again", gpus=0)
    assert read_json(again.plan_file) == read_json(first.plan_file)
    assert again.recipe_file.read_text() == first.recipe_file.read_text()
    rates = again.recipe().method.model_dump()["lr"]
    assert len(rates) == 3
    assert all(isinstance(rate, float) for rate in rates)


def test_run_of_a_recipe_without_schedule_over_goes_on_as_it_began(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, GRADUAL, train={"batch_size": 4, "schedule_over": "stage"})
    assert "start anew with each of 3 stages" in " ".join(read_json(run.plan_file)["notes"])
    run = prepare_run(tmp_path, GRADUAL, name="old", train={"batch_size": 4})
    kept = run.recipe_file.read_text(encoding="utf-8")
    run.recipe_file.write_text(kept.replace("  schedule_over: run\n", ""), encoding="utf-8")
    assert run.recipe_file.read_text(encoding="utf-8") != kept
    opened = run.recipe().train
    assert opened == prepare_run(tmp_path, GRADUAL, name="old", train={"batch_size": 4}).recipe().train
    assert opened.schedule_over == "run"


def test_takes_no_step_more_where_only_the_delta_is_gone(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, {"kind": "full", "lr": 0.01}, train={"max_steps": 3, "batch_size": 4})
    train(run)
    weights, log = (run.delta / TENSORS).read_bytes(), run.log_file.read_bytes()
    last = run.checkpoints / "step-000003"
    assert (run.delta / TENSORS).samefile(last / TENSORS)
    assert not (last / OPTIMIZER).exists()
    shutil.rmtree(run.delta)
    assert complete_checkpoints(run.checkpoints)[-1] == last
    train(run)
    assert (run.delta / TENSORS).read_bytes() == weights
    assert run.log_file.read_bytes() == log
    shutil.rmtree(run.checkpoints)
    assert run.done("train")
    assert run.verify("train")[f"delta/{TENSORS}"] == fingerprint(run.delta / TENSORS)


class ChangeTrained(TrainerCallback):
    """Changes a trained tensor after the last checkpoint."""

    def on_train_end(self, *_: object, model: nn.Module, **named: object) -> None:
        with torch.no_grad():
            model.get_parameter("model.norm.weight").mul_(2)


def test_delta_is_what_was_trained_and_not_the_checkpoint_where_they_differ(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, {"kind": "full", "lr": 0.01}, train={"max_steps": 1, "batch_size": 4})
    train(run, callbacks=[ChangeTrained()])
    delta, saved = load_file(run.delta / TENSORS), load_file(run.checkpoints / "step-000001" / TENSORS)
    assert [name for name in saved if not torch.equal(delta[name], saved[name])] == ["model.norm.weight"]


def test_refuses_to_resume_on_changed_data(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, {"kind": "full", "lr": 0.01})
    tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(41))
    with pytest.raises(RecipeError, match="data changed"):
        train(run)


def test_refuses_another_number_of_processes_than_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare_run(tmp_path, {"kind": "full", "lr": 0.01})
    monkeypatch.setenv(WORLD, "2")
    with pytest.raises(MachineError, match="2 processes were asked for and 1 started"):
        train(run)


def test_refuses_a_number_of_processes_that_accelerate_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare_run(tmp_path, {"kind": "full", "lr": 0.01})
    config = config_file("cpu")
    options = ["--config_file", str(config), "--num_processes", "2", "-m", "llmtune.train", str(run.path)]
    arguments = _validate_launch_command(launch_command_parser().parse_args(options))[0]
    for name, value in prepare_simple_launcher_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match="asked for several processes and started one"):
        train(run)


class ChangeFrozen(TrainerCallback):
    """Changes one element of a frozen tensor after the last step."""

    def on_train_end(self, *_: object, model: nn.Module, **named: object) -> None:
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] += 1


def test_fails_when_a_frozen_tensor_changed(tmp_path: Path) -> None:
    method, memory = {"kind": "frozen", "reach": 1, "lr": 0.01}, {"frozen_blocks": "recompute"}
    run = prepare_run(tmp_path, method, memory=memory)
    with pytest.raises(TrainingError, match=r"layers\.0\.mlp\.up_proj\.weight should have stayed frozen"):
        train(run, callbacks=[ChangeFrozen()])
    assert not run.done("train")


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's delta."""
    return load_file(next((folder / "delta").glob("*.safetensors")))


def llmtune(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "llmtune", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_processes_match_one_on_the_joined_batch(tmp_path: Path) -> None:
    method = GRADUAL | {"adapter": {"kind": "lora", "rank": 4}, "lr": 0.1}
    # AdamW divides by the gradient's size: it would magnify the rounding of near zeros, and hide a wrong scale.
    steps = {"epochs": 1, "batch_size": 4, "optimizer": "sgd"}
    train(prepare_run(tmp_path, method, name="one", train=steps))
    prepare_run(tmp_path, method, name="two", train=steps, launch={"accelerate": "multi_cpu", "processes": 2})
    result = llmtune("train", tmp_path / "two", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = deltas(tmp_path / "one"), deltas(tmp_path / "two")
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    counts = [max(json.loads(line).get("tokens", 0) for line in lines) for lines in logs]
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_trains_a_recipe_under_accelerate_launch_typed_by_hand(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", blocks=3)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    written = tiny.write_recipe(tmp_path / "by-hand.yaml", tmp_path / "base", data, {"kind": "full", "lr": 0.01})
    config = ROOT / "accelerate_configs" / "multi_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    result = subprocess.run(
        [*command, "-m", "llmtune.train", str(written)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Run(tmp_path / "runs" / "by-hand").done("train")


@pytest.mark.slow
def test_resumes_an_interrupted_run_to_equal_weights(tmp_path: Path) -> None:
    whole = prepare_run(tmp_path, GRADUAL, count=400, name="whole")
    train(whole)
    stopped = prepare_run(tmp_path, GRADUAL, count=400, name="stopped", merge={"enabled": False})
    command = [sys.executable, "-m", "llmtune", "run", str(stopped.path)]
    for number in (signal.SIGINT, signal.SIGTERM):
        logged = len(read_log(stopped.log_file))
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0)
        wait_for_steps(stopped, logged + 3)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 128 + number, errors
        assert f"llmtune run {stopped.path}" in errors
        assert not stopped.done("train")
        assert complete_checkpoints(stopped.checkpoints)
    train(stopped)
    expected, resumed = deltas(whole.path), deltas(stopped.path)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    parts = [(entry["measured"]["from"], entry["step"]) for entry in read_log(stopped.log_file) if "measured" in entry]
    ends = [end for _, end in parts]
    assert parts == list(zip([0, *ends[:-1]], [*ends[:2], read_json(stopped.plan_file)["steps"]], strict=True))


@pytest.mark.parametrize("method", [GRADUAL, {"kind": "frozen", "reach": 1, "lr": 0.01}], ids=["gradual", "frozen"])
@pytest.mark.slow
def test_cache_size_equals_the_plans_prediction(
    tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    run = prepare_run(tmp_path, method, memory={"frozen_blocks": "cache"}, train={"epochs": 3, "batch_size": 4})
    train(run)
    predicted = read_json(run.plan_file)["frozen_blocks"]
    files = list((tmp_path / "cache" / "frozen-blocks").glob("*/states.bin"))
    assert len(files) == len(predicted["boundaries"])
    assert sum(file.stat().st_size for file in files) == predicted["bytes"] > 0
    assert any("frozen blocks: cached" in line for line in run.log_file.read_text().splitlines())


def tiny_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe for a tiny base on rows in a folder."""
    tiny.save_base(folder / "base", blocks=3)
    data = tiny.write_rows(folder / "train.jsonl", tiny.sums(40))
    return tiny.write_recipe(folder / "r.yaml", folder / "base", data, {"kind": "full", "lr": 0.01}, **sections)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "after"), [(1, 0.3), (1, 3.0), (2, 3.0)])
def test_prints_one_line_for_a_stop_while_training_still_imports(tmp_path: Path, processes: int, after: float) -> None:
    recipe_file = tiny_recipe(tmp_path, launch={"processes": processes})
    command = [sys.executable, "-m", "llmtune", "run", str(recipe_file)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0)
    while not psutil.Process(process.pid).children():
        time.sleep(0.02)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "llmtune: stopped; nothing was trained yet\n"
    assert process.returncode == 130


@pytest.mark.slow
def test_prints_one_line_for_what_ends_a_training(tmp_path: Path) -> None:
    section = {"launch": {"processes": 2}, "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 8}}
    ended = llmtune("run", tiny_recipe(tmp_path, **section), cwd=tmp_path)
    assert ended.returncode == 2
    assert "longer than max_length 8" in ended.stderr
    assert ended.stderr.startswith("llmtune: ")
    assert ended.stderr.count("\n") == 1


def wait_for_steps(run: Run, count: int = 3) -> None:
    """Return when a run has logged so many steps."""
    until = time.monotonic() + 180
    while not (run.log_file.exists() and run.log_file.read_text().count("\n") >= count):
        assert time.monotonic() < until, "no step was logged"
        time.sleep(0.05)


def endless(folder: Path, processes: int) -> tuple[Run, subprocess.Popen[str]]:
    """A run that trains for ever in a command of its own, and that command."""
    train = {"epochs": 99999, "batch_size": 4, "save_every": 0.001}
    run = prepare_run(folder, {"kind": "full", "lr": 0.001}, train=train, launch={"processes": processes})
    command = [sys.executable, "-m", "llmtune", "run", str(run.path)]
    started = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_steps(run)
    return run, started


def training_processes(command: int) -> list[psutil.Process]:
    """The processes that train for a command, without a launcher between."""
    descendants = psutil.Process(command).children(recursive=True)
    return [process for process in descendants if "llmtune.launch.accelerate_entry" not in process.cmdline()]


@pytest.mark.slow
def test_training_ends_with_a_checkpoint_when_its_command_is_killed(tmp_path: Path) -> None:
    run, command = endless(tmp_path, 2)
    training = training_processes(command.pid)
    assert len(training) >= 2
    command.kill()
    command.communicate()
    ended = [process for process in psutil.wait_procs(training, timeout=30)[1] if process.status() != "zombie"]
    assert ended == []
    assert complete_checkpoints(run.checkpoints)
    with run.locked():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_training_names_the_signal_and_memory(tmp_path: Path, processes: int) -> None:
    run, command = endless(tmp_path, processes)
    training_processes(command.pid)[-1].kill()
    errors = command.communicate(timeout=120)[1]
    assert command.returncode == 3, errors
    message = "llmtune: the training process was killed (signal 9), probably by the system for lack of memory"
    assert errors.startswith(message)
    assert errors.count("\n") == 1
    assert errors.endswith(f"continue with: llmtune run {run.path}\n")
