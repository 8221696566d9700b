"""Checkpoints are complete or absent, and a run resumed from any of them ends bit-equal."""

import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llmtune.errors import MachineError, TrainingError
from llmtune.files import fingerprint, write_json
from llmtune.machine import processes
from llmtune.run_log import Record
from llmtune.training import checkpoint
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.stages.states import OPTIMIZER
from tests.support import tiny, training
from tests.support.training import GRADUAL, LORA, METHODS, fit


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "over"), [("none", "stage"), (LORA, "run")], ids=["none", "lora"])
def test_resume_after_any_step_is_bit_equal(tmp_path: Path, adapter: Any, over: str) -> None:
    spec = {**GRADUAL, "adapter": adapter}
    settings: dict[str, Any] = {
        "shape": "cosine",
        "warmup": 0.2,
        "over": over,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    _, whole, log = fit(tmp_path / "whole", spec, **settings)
    checkpoints = complete_checkpoints(tmp_path / "whole")
    assert [folder.name for folder in checkpoints] == [f"step-{n:06d}" for n in range(1, 7)]
    for step, saved in enumerate(checkpoints[:-1], 1):
        again: list[Record] = []
        trainer = training.trainer(tmp_path / "again", spec, record=again.append, **settings)
        trainer.train(resume_from_checkpoint=str(saved))
        assert [entry["step"] for entry in again] == list(range(step + 1, 7))
        assert again == log[step:]
        end = dict(trainer.model.named_parameters())
        assert all(torch.equal(end[name], whole[-1][name]) for name in end)


def test_ignores_a_damaged_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=2)
    shutil.rmtree(tmp_path / "step-000006")  # the last one holds no states
    newest = tmp_path / "step-000004"
    names = [file.name for file in newest.iterdir()]
    assert len(names) >= 6
    for name in names:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        assert complete_checkpoints(tmp_path)[-1].name == "step-000002", name
        (newest / name).unlink()
        assert complete_checkpoints(tmp_path)[-1].name == "step-000002", name
        (newest / name).write_bytes(content)
    assert complete_checkpoints(tmp_path)[-1] == newest


def test_last_checkpoint_holds_no_states_and_is_not_gone_on_from(tmp_path: Path) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=3)
    assert [(folder / OPTIMIZER).exists() for folder in complete_checkpoints(tmp_path)] == [True, False]
    longer = training.trainer(tmp_path / "longer", METHODS["full"], steps=8)
    with pytest.raises(TrainingError, match="without the optimizer's states; 8 steps need a new run"):
        longer.train(resume_from_checkpoint=str(tmp_path / "step-000006"))


def test_keeps_only_the_newest_checkpoints(tmp_path: Path) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=1, keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-000005", "step-000006"]


def test_removes_what_a_killed_run_left_unfinished(tmp_path: Path) -> None:
    unfinished = tmp_path / ".step-000002.partial-1"
    unfinished.mkdir()
    (unfinished / "optimizer.pt").write_bytes(b"half")
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=6)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000006"]


def test_ignores_folders_and_manifests_that_are_no_checkpoints(tmp_path: Path) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=6)
    whole = tmp_path / "step-000006"
    shutil.copytree(whole, tmp_path / "step-000006.copy")
    for number, text in ((7, "[1]"), (8, "3"), (9, ""), (10, "null")):
        (tmp_path / f"step-{number:06d}").mkdir()
        (tmp_path / f"step-{number:06d}" / "manifest.json").write_text(text)
    assert complete_checkpoints(tmp_path) == [whole]


def test_a_full_disk_is_one_line_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(blocks=4, tied=False)
    trained = sum(parameter.numel() for parameter in model.parameters())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40, 12 * trained - 1))
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    with pytest.raises(MachineError, match=r"a checkpoint takes about .* kB, and .* kB are free; free some, or lower"):
        fit(tmp_path, METHODS["full"], model=model, **settings)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**40, 2**40, 13 * trained))
    fit(tmp_path, METHODS["full"], model=tiny.model(blocks=4, tied=False), keep=1, **settings)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000006"]


def _watch_hashing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list that takes up every file of a checkpoint that is hashed from now on."""
    hashed = list[Path]()

    def watched(path: Path) -> dict[str, Any]:
        hashed.append(path)
        return fingerprint(path)

    monkeypatch.setattr(checkpoint, "fingerprint", watched)
    return hashed


def test_reads_no_checkpoint_again_that_did_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=3)
    whole = complete_checkpoints(tmp_path)
    hashed = _watch_hashing(monkeypatch)
    assert complete_checkpoints(tmp_path) == whole
    assert hashed == []
    (whole[0] / "objective.json").write_text("{}")
    assert complete_checkpoints(tmp_path) == whole[1:]
    assert {path.parent for path in hashed} == {whole[0]}
    monkeypatch.setattr(checkpoint, "_VERIFIED", {})  # another process
    assert complete_checkpoints(tmp_path) == whole[1:]
    assert {path.parent for path in hashed} == set(whole)


def test_one_process_on_each_machine_hashes_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=3)
    whole = complete_checkpoints(tmp_path)
    names = {folder.name for folder in whole}
    monkeypatch.setattr(processes, "gather", lambda mine: [names, None, mine])
    monkeypatch.setattr(checkpoint, "_VERIFIED", {})  # other processes
    hashed = _watch_hashing(monkeypatch)
    with monkeypatch.context() as second:
        second.setattr(processes, "is_first_here", lambda: False)
        assert complete_checkpoints(tmp_path) == whole
        assert hashed == []
    (whole[-1] / "objective.json").write_text("{}")  # as another machine's first process sees it
    assert complete_checkpoints(tmp_path) == whole[:-1]
    assert {path.parent for path in hashed} == set(whole)


def test_the_next_step_runs_while_a_checkpoint_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second_step, sealed_late = threading.Event(), threading.Event()
    seal = checkpoint._sealed

    def slow(file: Path) -> dict[str, Any]:
        if ".step-000001" in str(file):
            assert second_step.wait(60), "the training waits for the disk"
            sealed_late.set()
        return seal(file)

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            if state.global_step == 2:
                assert not (tmp_path / "step-000001").exists(), "it has its name before it is on disk"
                second_step.set()

    monkeypatch.setattr(checkpoint, "_sealed", slow)
    trainer = training.trainer(tmp_path, METHODS["full"], save_strategy="steps", save_steps=1, keep=9)
    trainer.add_callback(Steps())
    trainer.train()
    assert sealed_late.is_set()
    steps = [f"step-{number:06d}" for number in range(1, trainer.state.max_steps + 1)]
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == steps


def _before_sealing(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], None]) -> None:
    """Have a function called with a checkpoint's step before each of its files is put on disk."""
    seal = checkpoint._sealed

    def sealed(file: Path) -> dict[str, Any]:
        do(checkpoint.checkpoint_step(Path(file.parent.name.split(".")[1])))
        return seal(file)

    monkeypatch.setattr(checkpoint, "_sealed", sealed)


@pytest.mark.parametrize(
    ("full", "left"), [(range(20, 21), None), (range(40, 41), None), (range(40, 61), "step-000020")]
)
def test_what_fails_while_a_checkpoint_is_sealed_ends_the_training_and_keeps_the_one_before(
    tmp_path: Path, full: range, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: int) -> None:
        if step in full:
            raise OSError(28, f"No space left on device for step {step}")

    _before_sealing(monkeypatch, fail)
    trainer = training.trainer(tmp_path, METHODS["full"], steps=60, save_strategy="steps", save_steps=20, keep=1)
    with pytest.raises(OSError, match=rf"No space left on device for step {full[0]}\b") as caught:
        trainer.train()
    assert "a checkpoint takes about" in caught.value.__notes__[0]
    ended = trainer.state.global_step
    assert full[0] < ended < full[0] + 20, "it goes on to the next checkpoint"
    names = [folder.name for folder in complete_checkpoints(tmp_path)]
    assert names == [left or f"step-{ended:06d}"], "one more is tried; an old one goes once the new one is complete"
    assert not [*tmp_path.glob(".step-*")]


def test_a_stop_leaves_its_checkpoint_though_the_one_before_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()

    def fail(step: int) -> None:
        if step == 2:
            assert stopped.wait(60)
            raise OSError(28, "No space left on device")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            if state.global_step == 3:
                control.should_save = control.should_training_stop = True
                stopped.set()

    _before_sealing(monkeypatch, fail)
    trainer = training.trainer(tmp_path, METHODS["full"], save_strategy="steps", save_steps=2, callbacks=[Stop()])
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step-000003"]


def test_what_a_kill_leaves_of_an_old_checkpoint_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=3)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        checkpoint.remove_old(tmp_path, keep=1)
    assert [folder.name for folder in tmp_path.glob("step-*")] == ["step-000006"]
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=6)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000006"]


def test_checkpoints_after_a_million_steps_are_the_newest(tmp_path: Path) -> None:
    steps = (950_000, 1_000_000, 999_999)
    for step in steps:
        write_json(checkpoint.checkpoint_folder(tmp_path, step) / checkpoint.MANIFEST, {})
    assert [checkpoint.checkpoint_step(folder) for folder in complete_checkpoints(tmp_path)] == sorted(steps)
    checkpoint.remove_old(tmp_path, keep=1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-1000000"]
