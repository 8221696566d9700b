"""Settings that must stand before torch and the Hub client are imported."""

import gc
import os
import shutil
import threading
from pathlib import Path

import pytest

from llmtune.launch.quiet import quiet_libraries

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LLMTUNE_COMPARISONS"] = "off"  # what tests compare is no advice
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: more threads than cores stall each other
quiet_libraries()  # a test looks at what a command prints, as a process of llmtune's does


def pytest_configure(config: pytest.Config) -> None:
    """Hide this machine's GPUs, before torch is imported, unless tests of them are asked for: `-m gpu`."""
    if not _wants_gpus(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests of GPUs out, and say how many, where none is asked for or there is none."""
    from llmtune.machine.gpus import count_gpus

    if _wants_gpus(config) and count_gpus():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def _wants_gpus(config: pytest.Config) -> bool:
    words = str(config.getoption("markexpr")).split()
    return "gpu" in words and "not" not in words


def pytest_collection_finish() -> None:
    """Spare every trainer's collection of garbage what the imports made, which takes longer than its training."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let no test read or change the user's cache; processes that test side by side convert a .gguf file once."""
    folder, base = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp()
    for name in ("gguf", "locks"):
        shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
        shared.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(shared)
    os.environ["LLMTUNE_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def _asked_anew(_cache: Path) -> None:
    """Let every test ask its bases itself, whatever an earlier one changed in what asks them."""
    shutil.rmtree(_cache / "answers", ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded(pytestconfig: pytest.Config) -> None:
    """Let every test draw the same numbers, whatever ran before."""
    import torch

    # torch.manual_seed keeps the stack for GPUs that are not in use yet, which takes longer than many a test.
    seed = torch.manual_seed if _wants_gpus(pytestconfig) else torch.default_generator.manual_seed
    seed(0)


@pytest.fixture(autouse=True)
def _progress_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test begin as a process does, whatever an earlier one made of where lines of progress go."""
    monkeypatch.setattr("llmtune.working._ON_STDOUT", threading.Event())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock loader of merged folders in this process, which saves its start-up."""
    from tests.support import runs

    runs.reload_here(monkeypatch)
