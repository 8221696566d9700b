"""What a training's processes lack on their GPUs ends it in one line before weights load."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from llmtune import recipe
from llmtune.errors import MachineError
from llmtune.recipe.sections import Recipe
from llmtune.training import distributed
from llmtune.training.distributed import check_device, describe_cards, join_processes
from tests.support.recipes import GOOD, write

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 in the eyes of torch: no bf16 of its own."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


def settings(folder: Path, *overrides: str) -> Recipe:
    """A recipe with these overrides."""
    return recipe.load(write(folder, GOOD), overrides)


def test_takes_a_gpu_that_can_do_what_the_recipe_says(tmp_path: Path) -> None:
    for precision in ("auto", "fp16", "fp32"):
        check_device(settings(tmp_path, f"model.precision={precision}"), GPU)


def test_refuses_bf16_that_would_be_emulated(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="Tesla T4 has no bf16; try auto, which takes fp16 there"):
        check_device(settings(tmp_path, "model.precision=bf16"), GPU)


def test_refuses_a_gpu_for_which_torch_has_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(MachineError, match=r"no code for Tesla T4 \(sm_70\), only for sm_75, sm_80") as caught:
        check_device(settings(tmp_path), GPU)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("world", ["1", "2"])
def test_several_gpus_need_nccl(monkeypatch: pytest.MonkeyPatch, world: str) -> None:
    monkeypatch.setattr(distributed, "run_device", lambda: GPU)
    monkeypatch.setattr(distributed, "PartialState", lambda **options: SimpleNamespace(**options))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", world)
    if world == "1":
        assert not join_processes().cpu
        return
    with pytest.raises(MachineError, match="is built without NCCL, by which several GPUs communicate; set launch"):
        join_processes()


def test_describes_the_gpus_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Tesla T4", total_memory=16 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(distributed, "free_bytes", lambda _: 4 * 10**9)
    lines = describe_cards(settings(tmp_path), SimpleNamespace(device=GPU))
    assert lines == ["GPU 0 (Tesla T4): 12.0 GB of 16.0 GB is in use by other programs; `nvidia-smi` names them"]
    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    assert describe_cards(settings(tmp_path), on_cpu) == []
