"""One place says on which device a run computes, and in which data type; nothing else looks for a GPU."""

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from llmtune.launch.command import config_file
from llmtune.launch.devices import launch_device, uses_cpu
from llmtune.machine import device, precision
from llmtune.machine.precision import catch_up, computing_dtype, skipped
from llmtune.recipe.sections import Launch
from tests.support import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GPU_QUESTIONS = {"is_available", "device_count", "current_device"}
MAY_ASK = ("machine/device.py", "machine/gpus.py")
MAY_COMPARE = ("machine/", "kernels/")
COMPARES = {
    "advising/advice.py": "conditions of rules name a CPU or a GPU",
    "advising/here.py": "steps are timed on a CPU; of a card its usual rate is known; what this machine is called",
    "evaluation/spread/part.py": "Accelerate is told to use the CPU, and CUDA starts on a process's own GPU",
    "evaluation/reuse/facts.py": "answers of two processors differ: a card's name, a CPU's instructions",
    "estimate/measured.py": "peak memory is what torch reserved on a GPU, or what the process held",
    "frozen/check.py": "what is timed on a GPU is waited for",
    "frozen/reader.py": "rows are read ahead into pinned memory on another stream",
    "inference/placement.py": "a CPU maps files that are in its data type; words",
    "inference/room.py": "a CPU asks in batches that do not follow what is free",
    "inference/switch.py": "copies lie in main memory where a GPU has no room",
    "model/base.py": "transformers maps files on CPUs where no device is named",
    "model/quantize.py": "the CPU copies of weights that a file is mapped to are let go",
    "timing/predicted.py": "a CPU's rate is timed; a card's is known by its name",
    "timing/rate.py": "a card is known by its name",
    "training/arguments.py": "transformers asks whether to use the CPU and to pin rows",
    "training/distributed.py": "NCCL and what a GPU lacks; gloo between CPUs",
    "training/joining/joiner.py": "attention over short rows is a kernel for CPUs",
    "training/loop.py": "settings of glibc and oneDNN are for CPUs",
    "training/objective.py": "the kernels for CPUs",
    "training/passes/choice.py": "on CPUs a pass is sized in rows",
}
"""Modules that tell a CPU from a GPU elsewhere, each with its reason; the fewer the better."""
WORDS = re.compile(rf"{'|'.join(GPU_QUESTIONS)}|\.type\b|fork_rng")
"""What a module has to contain for a rule below to find anything in it."""
FILES = [file for file in sorted((ROOT / "llmtune").rglob("*.py")) if WORDS.search(file.read_text())]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in the eyes of torch."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("gpu")
def test_a_run_computes_on_the_device_of_its_launch_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(config_file("cpu").read_text())
    launches = {"auto": GPU, "single_gpu": GPU, "ddp": GPU, "fsdp2": GPU, "cpu": CPU, "multi_cpu": CPU, str(own): CPU}
    for name, expected in launches.items():
        launch = Launch.model_validate({"accelerate": name})
        assert launch_device(launch) == expected, name
        assert uses_cpu(launch) == (expected == CPU), name
    gone = Launch.model_validate({"accelerate": str(tmp_path / "gone.yaml")})
    assert launch_device(gone) == GPU
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert launch_device(Launch()) == CPU


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("word", "has_bf16", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float16),
        ("bf16", False, torch.bfloat16),
        ("fp16", True, torch.float16),
        ("fp32", True, torch.float32),
    ],
)
def test_computes_in_the_precision_that_the_gpu_has(
    monkeypatch: pytest.MonkeyPatch, word: str, has_bf16: bool, expected: torch.dtype
) -> None:
    """torch also counts bf16 that it emulates."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    assert computing_dtype(word) is computing_dtype(word, GPU) is expected


@pytest.mark.usefixtures("gpu")
def test_on_the_cpu_of_a_gpu_machine_the_cpus_precision_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "_cpu_has_bf16", lambda has=has: has)
        assert computing_dtype("auto", CPU) is expected


def test_restores_the_random_state_of_its_own_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(devices))
    device.forked_rng(CPU)
    device.forked_rng(GPU)
    assert forked == [[], [GPU]]


def test_rates_follow_the_step_where_the_scaler_skipped_one() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    catch_up(scheduler, 0)
    assert optimizer.param_groups[0]["lr"] == 1
    catch_up(scheduler, 3)
    assert optimizer.param_groups[0]["lr"] == 1 / 4
    assert skipped(True, float("inf")) == skipped(True, float("nan")) == {"skipped": True}
    assert skipped(True, 1.0) == skipped(False, float("inf")) == skipped(True, None) == {}


def name_of(file: Path) -> str:
    """A module's path within the package."""
    return file.relative_to(ROOT / "llmtune").as_posix()


@cache
def nodes() -> list[tuple[str, ast.AST]]:
    """Every node of every module, with the module's path within the package."""
    return [(name_of(file), node) for file in FILES for node in ast.walk(ast.parse(file.read_text()))]


def asks_for_a_gpu(node: ast.AST) -> bool:
    """Whether a node is torch.cuda.is_available or the like."""
    return isinstance(node, ast.Attribute) and node.attr in GPU_QUESTIONS and ast.unparse(node.value).endswith("cuda")


def compares_a_device(node: ast.AST) -> bool:
    """Whether a node compares the type of a device with a word."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    words = any(isinstance(side, ast.Constant) and side.value in ("cpu", "cuda") for side in sides)
    return words and any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides)


def forks_every_generator(node: ast.AST) -> bool:
    """Whether a node is fork_rng() without its devices."""
    return (
        isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "fork_rng" and not (node.args or node.keywords)
    )


def test_one_place_looks_for_a_gpu() -> None:
    assert {name for name, node in nodes() if asks_for_a_gpu(node)} == set(MAY_ASK)


def test_modules_that_tell_a_cpu_from_a_gpu_are_listed() -> None:
    comparing = {name for name, node in nodes() if compares_a_device(node) and not name.startswith(MAY_COMPARE)}
    assert comparing == set(COMPARES), "ask llmtune.machine.device, or give the reason here"


def test_random_states_are_forked_for_named_devices() -> None:
    assert {name for name, node in nodes() if forks_every_generator(node)} == set()


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("torch.cuda.is_available()", asks_for_a_gpu),
        ("cuda.device_count()", asks_for_a_gpu),
        ("x.device.type != 'cpu'", compares_a_device),
        ("'cuda' == args.device.type", compares_a_device),
        ("torch.random.fork_rng()", forks_every_generator),
    ],
)
def test_the_rules_find_what_they_forbid(source: str, rule: Callable[[ast.AST], bool]) -> None:
    assert any(rule(node) for node in ast.walk(ast.parse(source)))
    assert not any(rule(node) for node in ast.walk(ast.parse("torch.random.fork_rng(devices=[]), x.type, 'cpu'")))


@pytest.mark.gpu
def test_finds_the_gpu_and_what_is_free_on_it() -> None:
    here = device.run_device()
    assert here.type == "cuda"
    before = device.free_bytes(here)
    held = torch.empty(2**28, dtype=torch.uint8, device=here)
    assert before - device.free_bytes(here) >= held.numel()
    assert computing_dtype("auto") in (torch.bfloat16, torch.float16)
