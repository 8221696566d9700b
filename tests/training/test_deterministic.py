"""`train.deterministic` asks torch and cuBLAS for operations that give the same bits each time."""

import os
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from llmtune.errors import LlmtuneError
from llmtune.training.distributed import deterministic
from llmtune.training.loop import train
from tests.support.training import METHODS, prepare_run

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
Settings = tuple[bool, bool, bool, str | None]


def settings() -> Settings:
    """What decides whether operations repeat themselves."""
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, os.environ.get(CUBLAS)


class Watch(TrainerCallback):
    """Keeps the settings of a training's first step."""

    def on_step_begin(self, *_: object, **named: object) -> None:
        self.settings = settings()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_training_runs_under_deterministic_algorithms_where_its_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setenv(CUBLAS, "")  # put back after the test, whatever the training sets
    before, watch = settings(), Watch()
    run = prepare_run(tmp_path, METHODS["full"], train={"epochs": 1, "max_steps": 1, "deterministic": wanted})
    train(run, callbacks=[watch])
    assert watch.settings == ((True, True, False, ":4096:8") if wanted else before)
    assert settings()[:3] == before[:3]


@pytest.mark.parametrize(("own", "stands"), [(":16:8", ":16:8"), (":4096:2:16:8", ":4096:8")])
def test_a_users_workspace_stands_where_cublas_repeats_itself_with_it(
    monkeypatch: pytest.MonkeyPatch, own: str, stands: str
) -> None:
    monkeypatch.setenv(CUBLAS, own)
    with deterministic(True):
        assert settings()[3] == stands


class Unrepeatable(TrainerCallback):
    """Does what torch refuses under deterministic algorithms: it says so of operations on GPUs."""

    def on_step_begin(self, *_: object, **named: object) -> None:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("upsample_backward_cuda does not have a deterministic implementation, but you set ...")


def test_an_operation_that_cannot_repeat_itself_ends_the_run_with_its_name(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, METHODS["full"], train={"epochs": 1, "max_steps": 1, "deterministic": True})
    with pytest.raises(LlmtuneError, match=r"train\.deterministic: upsample_backward_cuda does not have") as caught:
        train(run, callbacks=[Unrepeatable()])
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
