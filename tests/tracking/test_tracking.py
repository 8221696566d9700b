"""Trackers: what they are sent, that one process sends it under one id, and that none ends a run."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import TrainerCallback

from llmtune import recipe
from llmtune.errors import RecipeError
from llmtune.tracking.kinds import KINDS
from llmtune.tracking.tracking import FOLDER, IDS, tracked
from llmtune.training.loop import train
from tests.support import tiny
from tests.support.training import prepare_run

WANDB = """
import os
class _Config(dict):
    def update(self, values, **k): calls.append(["config", values])
calls, run, config = [], None, _Config()
class _Run:
    id, name, summary = "x", "x", {}
    def _label(self, **k): pass
def init(**named):
    global run
    run = _Run()
    calls.append(["init", named, {k: v for k, v in os.environ.items() if k.startswith("WANDB_")}])
def log(values): calls.append(["log", values])
def define_metric(*a, **k): pass
def termwarn(*a, **k): pass
def teardown():
    global run
    run = None
    calls.append(["finish"])
"""
TRACKIO = """
class _Config(dict):
    def update(self, values, **k): calls.append(["config", values])
calls, config, __version__ = [], _Config(), "0.43.0"
class context_vars:
    class current_space_id: get = staticmethod(lambda: None)
def init(**named): calls.append(["init", named])
def log(values): calls.append(["log", values])
def finish(): calls.append(["finish"])
"""
MLFLOW = """
import os
from types import SimpleNamespace as Bag
calls, active, __version__ = [], None, "3.17.2"
utils = Bag(validation=Bag(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))
def is_tracking_uri_set(): return True
def get_tracking_uri(): return "file:here"
def active_run(): return active
def set_experiment(name): calls.append(["experiment", name])
def start_run(**named):
    global active
    active = Bag(info=Bag(run_id=os.environ.get("MLFLOW_RUN_ID", "made-by-mlflow")))
    calls.append(["init", active.info.run_id])
def log_params(values, **k): calls.append(["config", values])
def log_metrics(metrics, step, **k): calls.append(["log", {**metrics, "step": step}])
def end_run():
    global active
    active = None
    calls.append(["finish"])
"""
TRACKERS_VARIABLES = ("WANDB_", "MLFLOW_", "TENSORBOARD_", "TRACKIO_")
WRITER = """
calls = []
class SummaryWriter:
    def __init__(self, folder, purge_step): calls.append(["init", folder, purge_step])
    def add_text(self, name, text): calls.append(["config", {name: text}])
    def add_scalar(self, name, value, step): calls.append(["log", {name: value, "step": step}])
    def flush(self): pass
    def close(self): calls.append(["finish"])
"""
CANARY = "hf_CANARYcanaryCANARYcanary"
METHOD = {"kind": "gradual", "reaches": [1, "all"], "lr": 0.01}
ALL = ["trackio", "tensorboard", "wandb", "mlflow"]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Packages in place of the trackers that need a network or a database; each keeps what it is called with."""
    for name, source in {"wandb": WANDB, "trackio": TRACKIO, "mlflow": MLFLOW}.items():
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(source)
    config_util = tmp_path / "site" / "wandb" / "sdk" / "lib" / "config_util.py"
    config_util.parent.mkdir(parents=True)
    config_util.write_text("class ConfigError(Exception): pass\n")
    (tmp_path / "site" / "tensorboard").mkdir()
    (tmp_path / "site" / "tensorboard" / "__init__.py").touch()
    writer = ModuleType("torch.utils.tensorboard")
    exec(WRITER, vars(writer))
    monkeypatch.setitem(sys.modules, writer.__name__, writer)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    names = ("wandb", "trackio", "mlflow")
    yield {name: __import__(name) for name in names} | {"tensorboard": writer}
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]


class EndsAt(TrainerCallback):
    """Ends the training after a step, as a power cut would, once its checkpoint is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **named: object) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def logged(package: ModuleType, key: str) -> list[float]:
    """The values of a metric in the order in which a package got them."""
    return [call[1][key] for call in package.calls if call[0] == "log" and key in call[1]]


def test_trackers_get_every_step_under_one_id_and_no_token(tmp_path: Path, packages: dict[str, ModuleType]) -> None:
    training = {"max_steps": 6, "batch_size": 4, "save_every": 0.5}
    run = prepare_run(tmp_path, METHOD, train=training, track=ALL)
    environment = dict(os.environ)
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[EndsAt(5)])
    train(run)
    assert not [key for key in os.environ.keys() - environment.keys() if key.startswith(TRACKERS_VARIABLES)]
    losses = {entry["step"]: entry["loss"] for entry in map(json.loads, run.log_file.open()) if "loss" in entry}
    ids = json.loads((run.path / FOLDER / IDS).read_text())
    wandb, mlflow, trackio = (packages[name].calls for name in ("wandb", "mlflow", "trackio"))
    for package, key in (
        ("wandb", "train/loss"),
        ("trackio", "train/loss"),
        ("mlflow", "loss"),
        ("tensorboard", "train/loss"),
    ):
        sent = logged(packages[package], key)
        assert sent[-3:] == [losses[4], losses[5], losses[6]], package  # steps 4 and 5 come again after the checkpoint
        assert sent[:3] == [losses[1], losses[2], losses[3]], package
    assert logged(packages["wandb"], "train/lr/0") or logged(packages["wandb"], "train/lr/1")
    assert len(logged(packages["wandb"], "eval/loss")) >= 2
    starts = [call for call in wandb if call[0] == "init"]
    assert [start[2]["WANDB_RUN_ID"] for start in starts] == [ids["run"]] * 2
    assert {start[2]["WANDB_LOG_MODEL"] for start in starts} == {"false"}
    assert [call[1] for call in mlflow if call[0] == "init"] == ["made-by-mlflow"] * 2
    assert ids["mlflow"] == "made-by-mlflow"
    assert len({call[1]["name"] for call in trackio if call[0] == "init"}) == 1
    assert all(call[1]["space_id"] is None for call in trackio if call[0] == "init")
    facts = next(call[1] for call in wandb if call[0] == "config")
    assert facts["method.kind"] == "gradual"
    assert "distances" in facts["plan.stage_2"]
    assert not [value for value in facts.values() if str(tmp_path) in str(value)]
    board = packages["tensorboard"].calls
    folder = str(run.path.resolve() / FOLDER / "tensorboard")
    assert [call[1:] for call in board if call[0] == "init"] == [[folder, 1], [folder, 4]]
    payloads = json.dumps([[call[:2] for call in calls] for calls in (wandb, mlflow, trackio, board)], default=str)
    written = b"".join(file.read_bytes() for file in run.path.rglob("*") if file.is_file())
    assert CANARY not in payloads
    assert CANARY.encode() not in written


def test_failing_tracker_is_a_warning_and_the_others_go_on(tmp_path: Path, packages: dict[str, ModuleType]) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nmore lines")

    packages["wandb"].init = fails  # type: ignore[attr-defined]
    sent: list[Any] = []
    packages["trackio"].log = lambda values: sent.append(values) if len(sent) < 2 else fails()  # type: ignore[attr-defined]
    run = prepare_run(tmp_path, METHOD, train={"max_steps": 4, "batch_size": 4}, track=["wandb", "trackio", "mlflow"])
    train(run)
    assert run.done("train")
    warnings = [entry["warning"] for entry in map(json.loads, run.log_file.open()) if "warning" in entry]
    assert warnings == [f"warning: {name} gets nothing more: no network" for name in ("wandb", "trackio")]
    assert len(logged(packages["mlflow"], "loss")) == 4


def test_process_that_does_not_report_starts_no_tracker(tmp_path: Path, packages: dict[str, ModuleType]) -> None:
    run = prepare_run(tmp_path, METHOD, track=["wandb"])
    with tracked(run, 0, lambda entry: None, reports=False) as send:
        assert send is None
    assert packages["wandb"].calls == []
    assert not (run.path / FOLDER).exists()


@pytest.mark.parametrize("name", sorted(KINDS))
def test_tracker_that_is_not_installed_is_refused_before_training(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Exception, match=rf"track: {name} is not installed; try pip install {name}") as error:
        prepare_run(tmp_path, METHOD, track=[name])
    assert error.value.exit_code == 3  # type: ignore[attr-defined]


def test_unknown_tracker_is_a_mistake_in_the_recipe(tmp_path: Path) -> None:
    file = tiny.write_recipe(tmp_path / "r.yaml", tmp_path, tmp_path, track=["wandbb"])
    with pytest.raises(RecipeError, match="wandb"):
        recipe.load(file)
