"""One place says on which device a run computes, and in which data type; nothing else looks for a GPU."""

from pathlib import Path

import pytest
import torch

from llmtune.launch.command import config_file
from llmtune.launch.devices import launch_device, uses_cpu
from llmtune.machine import device, precision
from llmtune.machine.precision import catch_up, computing_dtype, skipped
from llmtune.recipe.sections import Launch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ELSEWHERE = {
    "evaluation/generate.py": "",
}


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
