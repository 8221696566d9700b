"""GPUs: how many torch can use, why it cannot use others, and what a process sees of them."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtune.errors import MachineError
from llmtune.machine.gpus import (
    VISIBLE,
    Card,
    Gpus,
    card_notes,
    count_gpus,
    driver_version,
    find_gpus,
    first_gpu,
    lacks_kernels,
    show_gpus,
)
from llmtune.training.distributed import compare_cards

GB = 10**9
DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.3.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)  Thu Jan\n"
Find = Callable[..., Gpus]


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Find:
    """`find_gpus` on a machine with two GPUs, for a torch build, a driver, and what CUDA_VISIBLE_DEVICES says."""

    def find(available: bool, count: int, cuda: str | None = "13.0", visible: str | None = None) -> Gpus:
        for name in ("nvidia0", "nvidia1"):
            (tmp_path / name).touch()
        (tmp_path / "version").write_text(DRIVER)
        monkeypatch.delenv(VISIBLE, raising=False)
        if visible is not None:
            monkeypatch.setenv(VISIBLE, visible)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", "2.13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("old", stacklevel=1) or available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return find_gpus(tmp_path, tmp_path / "version")

    return find


def test_counts_what_torch_can_use(find: Find, recwarn: pytest.WarningsRecorder) -> None:
    assert find(True, 2) == Gpus(2)
    assert find(True, 1, visible="1") == Gpus(1)
    assert find(True, 2, visible="GPU-8f,GPU-9a") == Gpus(2)
    assert find(True, 1, visible="0,-1,1") == Gpus(1)
    assert not recwarn.list


def test_says_why_torch_cannot_use_a_gpu(find: Find) -> None:
    """NVML counts two GPUs under a driver that is too old for torch."""
    old = find(False, 2)
    assert old.count == 0
    assert old.fault.startswith(
        "torch 2.13.0 is built for CUDA 13.0 and finds no GPU that it can use with the NVIDIA driver 535.104.05; update"
    )
    without = find(False, 0, cuda=None)
    assert without.fault.startswith(
        "torch 2.13.0 is a build without CUDA, and this machine has a GPU; https://pytorch.org"
    )
    assert without.count == 0


@pytest.mark.parametrize(
    ("visible", "count", "fault"),
    [
        ("", 0, "CUDA_VISIBLE_DEVICES is '', which hides every GPU; unset it"),
        ("-1", 0, "CUDA_VISIBLE_DEVICES is '-1', which hides every GPU; unset it"),
        ("7", 0, "CUDA_VISIBLE_DEVICES=7 names a GPU that is not there; `nvidia-smi -L` lists those that are"),
        ("0,7", 1, "CUDA_VISIBLE_DEVICES=0,7 names a GPU that is not there; `nvidia-smi -L` lists those that are"),
    ],
)
def test_says_what_cuda_visible_devices_hides(find: Find, visible: str, count: int, fault: str) -> None:
    assert find(count > 0, count, visible=visible) == Gpus(count, fault)


def test_imports_no_torch_without_a_gpu_device_file(tmp_path: Path) -> None:
    code = f"import sys; from pathlib import Path; from {count_gpus.__module__} import count_gpus\n"
    code += "print(count_gpus(Path(sys.argv[1])), 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["0", "False"]


def test_reads_the_drivers_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    for text, version in ((DRIVER, "535.104.05"), (OPEN, "570.86.15"), ("nothing", "")):
        file.write_text(text)
        assert driver_version(file) == version
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert driver_version(tmp_path / "none") == ""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setattr("shutil.which", lambda name: str(tool))
    for script, version in (("echo 551.23; echo 551.23", "551.23"), ("echo NVIDIA-SMI has failed; exit 9", "")):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert driver_version(tmp_path / "none") == version


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 9), ["sm_75", "sm_80", "sm_90"], True),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((7, 0), ["sm_75", "sm_80", "sm_120", "compute_120"], False),
        ((8, 0), ["sm_86"], False),
        ((12, 1), ["sm_120"], True),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),
        ((9, 4), ["gfx942"], True),
    ],
)
def test_knows_whether_a_build_has_code_for_a_gpu(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    message = lacks_kernels("Tesla V100", capability, built)
    assert (message == "") == runs
    if not runs:
        assert message.startswith(f"this torch build has no code for Tesla V100 (sm_{capability[0]}{capability[1]})")


def test_tells_of_gpus_that_differ_and_of_one_in_use() -> None:
    even = [Card("A", 24 * GB, 23 * GB, "bfloat16")] * 2
    assert card_notes(even) == []
    assert card_notes([even[0], Card("B", 16 * GB, 15 * GB)]) == [
        "the GPUs differ (A 24.0 GB, B 16.0 GB): the smallest decides what fits, the slowest how long a step takes"
    ]
    assert card_notes([even[0], Card("A", 24 * GB, 10 * GB)]) == [
        "GPU 1 (A): 14.0 GB of 24.0 GB is in use by other programs; `nvidia-smi` names them"
    ]
    with pytest.raises(MachineError, match="A in bfloat16 and T4 in float16; set model"):
        compare_cards([even[0], Card("T4", 24 * GB, 23 * GB, "float16")])


@pytest.mark.parametrize(
    ("environment", "sees"),
    [
        ({}, "0"),
        ({VISIBLE: "2,3"}, "2"),
        ({VISIBLE: ""}, ""),
        ({"WORLD_SIZE": "1", VISIBLE: "2,3"}, "2"),
        ({"WORLD_SIZE": "2", VISIBLE: "2,3"}, None),
        ({"ACCELERATE_USE_CPU": "True", VISIBLE: "2,3"}, ""),
        ({"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}, ""),
        ({"ACCELERATE_USE_CPU": "False"}, "0"),
    ],
)
def test_a_process_launched_by_hand_sees_what_is_its_own(environment: dict[str, str], sees: str | None) -> None:
    assert show_gpus(environment) == ({} if sees is None else {VISIBLE: sees})
    assert first_gpu(environment.get(VISIBLE)) == environment.get(VISIBLE, "0").split(",")[0]
