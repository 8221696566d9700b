"""A run on a store: whole there at every moment, taken up on another machine, and never written by two."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from transformers import TrainerCallback

import llmtune
from llmtune.cli.app import main
from llmtune.errors import MachineError, RecipeError
from llmtune.files import fingerprint, write_json
from llmtune.launch import process
from llmtune.launch.ending import Exit
from llmtune.run import open_run
from llmtune.storage import fetch, keep_stored, run_folder, session, url_of
from llmtune.storage.mirror import Mirror
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from tests.support import tiny

URL = "memory://bucket/runs/x"
INDEX = "/bucket/runs/x/store.json"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty store in memory; what fails there is tried again at once."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    monkeypatch.setattr(session, "PAUSES", (0.0, 0.0))
    yield store
    store.store.clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Goes on as the machine of a name, with a disk of its own; gives the folder there for the run at the URL."""

    def move(name: str) -> Path:
        monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / name))
        return run_folder(URL)

    return move


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files of a run."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def checkpoint(folder: Path, step: int) -> None:
    """Write a complete checkpoint."""
    path = folder / "checkpoints" / f"step-{step:06d}"
    write(path, {"tensors": f"tensors {step}"})
    write_json(path / "manifest.json", {"tensors": fingerprint(path / "tensors")})


def remove_checkpoint(folder: Path, step: int) -> None:
    """Remove a checkpoint, as training does with old ones."""
    path = folder / "checkpoints" / f"step-{step:06d}"
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def stored(bucket: Any) -> dict[str, bytes]:
    """What the store holds, by name in the run's folder, without its index."""
    names = {path.removeprefix("/bucket/runs/x/"): path for path in bucket.find("/bucket")}
    return {name: bucket.cat_file(path) for name, path in names.items() if name != "store.json"}


def local(folder: Path) -> dict[str, bytes]:
    """What a run's folder holds, without locks."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def failing(monkeypatch: pytest.MonkeyPatch, method: str = "put_file") -> None:
    """Cut the connection to the store."""

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the network is down")

    monkeypatch.setattr(MemoryFileSystem, method, fail)


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://b/x/", "s3://b/x"),
        (Path("s3://b/x"), "s3://b/x"),
        ("s3:/b/x", "s3://b/x"),
        (Path("file:///tmp/x"), "file:///tmp/x"),
        ("runs/x", None),
        (Path("/runs/a:b"), None),
        ("c:/runs", None),
    ],
)
def test_tells_urls_from_paths(place: Path | str, url: str | None) -> None:
    assert url_of(place) == url


def test_store_never_names_what_is_half_there(
    bucket: Any, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sent, put = machine("a"), [], MemoryFileSystem.put_file

    def watched(self: Any, source: str, path: str, *rest: Any, **options: Any) -> Any:
        name = path.removeprefix("/bucket/runs/x/").removesuffix(".partial")
        if name != "store.json":
            index = json.loads(bucket.cat_file(INDEX))
            assert name in index["pending"]
            assert "/" not in name or name not in index["files"]  # who reads now misses it, and takes no half of it
            sent.append(name)
        return put(self, source, path, *rest, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", watched)
    with keep_stored(folder):
        write(folder, {"recipe.yaml": "r", "manifest.json": "{}", "log.jsonl": "1", ".lock": ""})
        write(folder, {"checkpoints/.step-000004.partial-1/tensors": "half", "eval/.base.json.partial": "half"})
        checkpoint(folder, 2)
        Mirror(folder, URL).send()
        assert sent == [f"checkpoints/step-000002/{name}" for name in ("tensors", "manifest.json")] + [
            "log.jsonl",
            "recipe.yaml",
            "manifest.json",
        ]
        checkpoint(folder, 4)
        remove_checkpoint(folder, 2)
        write(folder, {"checkpoints/step-000004/tensors": "other tensors"})
    whole = {name: text for name, text in local(folder).items() if "/." not in name}
    assert stored(bucket) == whole
    assert "checkpoints/step-000002/tensors" not in whole
    assert sorted(json.loads(bucket.cat_file(INDEX))["files"]) == sorted(whole)


def test_another_machine_takes_over_and_the_first_one_no_longer_writes(
    bucket: Any, machine: Callable[[str], Path]
) -> None:
    first = machine("a")
    with pytest.raises(MachineError, match="another machine works on this run"), keep_stored(first):  # noqa: PT012
        write(first, {"recipe.yaml": "r", "log.jsonl": "1"})
        checkpoint(first, 2)
        Mirror(first, URL).send()
        second = machine("b")
        fetch(second, must_exist=True)
        assert local(second) == local(first)
        with keep_stored(second):
            checkpoint(second, 4)
            remove_checkpoint(second, 2)
        write(first, {"log.jsonl": "what a machine that lost the run still writes"})
    assert stored(bucket) == local(second)
    machine("a")
    fetch(first)
    assert local(first) == local(second)
    assert not (first / "checkpoints" / "step-000002").exists()


def test_same_machine_goes_on_with_what_it_could_not_send(
    bucket: Any, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = machine("a")
    lost = "the network is down; the run is whole in .*llmtune run"
    with pytest.raises(MachineError, match=lost) as error, keep_stored(folder):  # noqa: PT012
        write(folder, {"recipe.yaml": "r"})
        sender = session.Sender(Mirror(folder, URL))
        failing(monkeypatch)
        assert not sender.look()
        assert not sender.look()
    assert error.value.exit_code == 3
    notes = capsys.readouterr().err
    assert notes.count("the network is down; the work goes on") == 1
    assert stored(bucket) == {}
    monkeypatch.undo()
    machine("a")
    fetch(folder)
    assert local(folder) == {"recipe.yaml": b"r"}
    with keep_stored(folder):
        pass
    assert stored(bucket) == local(folder)


def test_error_of_the_work_goes_before_a_lost_store(
    bucket: Any, machine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = machine("a")
    with pytest.raises(RecipeError, match="of the work"), keep_stored(folder):  # noqa: PT012
        write(folder, {"recipe.yaml": "r"})
        failing(monkeypatch)
        raise RecipeError("of the work")
    assert "the run is whole in" in capsys.readouterr().err


def test_finished_training_leaves_checkpoints_on_the_store(bucket: Any, machine: Callable[[str], Path]) -> None:
    first = machine("a")
    with keep_stored(first):
        checkpoint(first, 2)
        write(first, {"recipe.yaml": "r", "delta/trained": "t"})
        write_json(
            first / "manifest.json",
            {"steps": {"train": {"files": {"delta/trained": fingerprint(first / "delta/trained")}}}},
        )
    second = machine("b")
    fetch(second)
    assert {*stored(bucket)} - {*local(second)} == {
        f"checkpoints/step-000002/{n}" for n in ("tensors", "manifest.json")
    }
    with keep_stored(second):
        write(second, {"eval/base.json": "1"})
    assert stored(bucket) == {**local(first), **local(second)}
    with keep_stored(second):
        write(second, {"manifest.json": "{}"})  # the training begins anew
    assert stored(bucket) == local(second)


@pytest.mark.parametrize(
    ("url", "words", "code"),
    [
        ("gone://bucket/x", "needs a package that is not here: Install it; pip install goner", 3),
        ("memori://bucket/x", "fsspec knows no store 'memori'; did you mean 'memory'\\?", 2),
        ("memory://bucket/none", "holds no run; give the URL", 2),
        ("memory://", "names no folder", 2),
    ],
)
def test_refuses_a_store_in_one_line(
    url: str, words: str, code: int, bucket: Any, machine: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    machine("a")
    fsspec.register_implementation("gone", "goner.GoneFileSystem", clobber=True, errtxt="Install it")
    assert main(["report", url]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(words, lines[0])


def test_refuses_a_url_that_holds_other_files_and_leaves_them(bucket: Any, machine: Callable[[str], Path]) -> None:
    bucket.pipe_file("/bucket/runs/x/thesis.txt", b"years of work")
    with pytest.raises(RecipeError, match="is not empty and holds no run"), keep_stored(machine("a")):
        pass
    assert stored(bucket) == {"thesis.txt": b"years of work"}


class PowerLoss(TrainerCallback):
    """Ends a training in the middle of a step, once its last checkpoint is on the store."""

    def __init__(self, bucket: Any, step: int) -> None:
        self.bucket, self.step, self.mirror = bucket, step, Mirror(run_folder(URL), URL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.mirror.send()
            raise ConnectionAbortedError


@pytest.mark.slow
def test_preempted_run_ends_on_another_machine_with_the_same_weights(
    bucket: Any, machine: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = tiny.save_base(tmp_path / "base"), tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(40))
    sections: dict[str, Any] = {"train": {"epochs": 2, "batch_size": 4, "save_every": 0.1}, "eval": {"suite": "none"}}
    file = tiny.write_recipe(tmp_path / "recipe.json", base, rows, **sections)
    settings = llmtune.Recipe.load(file)
    train(prepare(settings, tmp_path / "whole", 0))
    started: list[bool] = []

    def start(_: Any, words: list[str]) -> Exit:
        """Train in this process: the first time until the power is lost, which nothing here survives."""
        run = prepare(settings, run_folder(URL), 0)
        started.append(bool(complete_checkpoints(run.checkpoints)))
        if len(started) == 1:
            monkeypatch.setattr(session, "_send_rest", lambda *_, **__: None)
            train(run, callbacks=[PowerLoss(bucket, 9)])
        train(run)
        return Exit(0, "")

    monkeypatch.setattr(process, "run_training", start)
    send_rest = session._send_rest
    machine("a")
    with pytest.raises(ConnectionAbortedError):
        llmtune.train(file, URL)
    monkeypatch.setattr(session, "_send_rest", send_rest)
    folder = machine("b")
    run = llmtune.train(file, URL)
    assert started == [False, True]
    assert run.path == folder
    weights = "delta/trained.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    machine("c")
    assert main(["report", URL]) == 0
    assert {weights, "report.html", "manifest.json"} <= set(stored(bucket))
    assert not open_run(run_folder(URL)).checkpoints.exists()
