"""Files and folders are complete or absent, whatever happens while they are written."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError, MachineError
from llmtune.files import (
    fingerprint,
    hashes,
    hold,
    link,
    read_json,
    remove_unused,
    write_file,
    write_folder,
    write_json,
    write_text,
)
from tests.support import ROOT


def full_disk(*_: object) -> None:
    """Write to a disk without room."""
    raise OSError(28, "No space left on device")


def names(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(entry.name for entry in folder.iterdir())


def test_fingerprint_is_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert fingerprint(tmp_path / "file") == {"bytes": 3, "sha256": digest}


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, second, reads, digest = tmp_path / "file", tmp_path / "second", list[str](), hashes._sha256

    def watched(stream: io.FileIO, size: int) -> str:
        reads.append(str(stream.name))
        return digest(stream, size)

    monkeypatch.setattr(hashes, "_sha256", watched)
    monkeypatch.setattr(hashes, "FINE", 10**15)
    file.write_bytes(b"h")
    assert fingerprint(file) == fingerprint(file)
    assert len(reads) == 2, "a next change might have the same time"
    monkeypatch.setattr(hashes, "FINE", 0)
    reads.clear()
    facts = fingerprint(file)
    link(file, second)
    assert fingerprint(file) == fingerprint(second) == facts
    assert reads == [str(file)]
    write_text(second, "new")  # replaces one name, and leaves the other
    time.sleep(0.02)  # more than a tick of a kernel's clock
    file.write_bytes(b"i")
    assert [fingerprint(one)["bytes"] for one in (file, second)] == [1, 3]
    assert fingerprint(file) != facts


def test_links_share_a_file_and_a_disk_without_links_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"weights")
    link(file, tmp_path / "linked")
    monkeypatch.setattr(os, "link", full_disk)
    link(file, tmp_path / "copied")
    file.unlink()
    assert [(tmp_path / name).read_bytes() for name in ("linked", "copied")] == [b"weights"] * 2


def test_writes_json_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "value.json"
    write_json(file, {"Ü": [1, 2.5, None]})
    assert read_json(file) == {"Ü": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(file, {"unwritable": object()})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(file, {"new": 1})
    assert read_json(file) == {"Ü": [1, 2.5, None]}


def test_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    values = [list(range(size)) for size in (10, 50_000)]
    write_json(file, values[0])
    seen: list[list[int]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(json.loads(file.read_text()))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(20):
        write_json(file, values[turn % 2])
    stop.set()
    reader.join()
    assert seen
    assert all(value in values for value in seen)
    assert names(tmp_path) == ["value.json"]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    with write_file(file) as first:
        first.write_text("hal")
        with write_file(file) as second:
            assert second.name == file.name
            second.write_text("second")
        assert file.read_text() == "second"
        first.unlink()  # as libraries do that rename a file of their own
        first.write_text("first")
    assert file.read_text() == "first"
    assert names(tmp_path) == ["value.json"]


def test_many_writers_of_one_file_end_with_a_whole_one(tmp_path: Path) -> None:
    values = [list(range(size)) for size in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda value: write_json(tmp_path / "value.json", value), values))
    assert read_json(tmp_path / "value.json") in values
    assert names(tmp_path) == ["value.json"]


def test_half_file_of_a_killed_writer_is_removed_by_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    code = f"""
import os
from pathlib import Path
from llmtune.files import write_file
with write_file(Path({str(file)!r})) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert len(names(tmp_path)) == 1
    (tmp_path / ".value.json.backup.partial-1").mkdir()
    write_json(file, 1)
    assert names(tmp_path) == [".value.json.backup.partial-1", "value.json"]


def test_folder_appears_complete_and_replaces_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    for content in ("old", "new"):
        with write_folder(folder) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / content).write_text(content)
            assert not folder.exists() or names(folder / "inner") == ["old"]
        assert names(folder / "inner") == [content]
    assert names(folder.parent) == ["folder"]


def interrupt() -> None:
    """Stop as by Ctrl-C."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [interrupt, lambda: full_disk(0)], ids=["interrupt", "full disk"])
def test_failed_folder_leaves_nothing_and_keeps_the_old_one(tmp_path: Path, fail: Callable[[], None]) -> None:
    folder = tmp_path / "folder"

    def write_half() -> None:
        with write_folder(folder) as partial:
            (partial / "half").write_text("half")
            fail()

    for expected in ([], ["folder"]):
        with pytest.raises((KeyboardInterrupt, OSError)):
            write_half()
        assert names(tmp_path) == expected
        with write_folder(folder) as partial:
            (partial / "whole").write_text("whole")
        assert names(folder) == ["whole"]


def test_folder_is_on_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"), write_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("content")
    assert not names(tmp_path)


def test_weights_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    with write_folder(tmp_path / "merged") as partial:
        for name, mode in (("model.safetensors", 0o600), ("serve.sh", 0o755), ("locked", 0o400)):
            (partial / name).write_text("")
            (partial / name).chmod(mode)
        (partial / "config.json").write_text("{}")
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "merged").iterdir()}
    assert modes.pop("model.safetensors") == modes.pop("config.json") != 0o600
    assert modes == {"serve.sh": 0o755, "locked": 0o400}


def test_folder_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    left = tmp_path / f".folder.partial-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("half")
    with write_folder(tmp_path / "folder") as partial:
        (partial / "whole").write_text("whole")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["whole"]


def test_second_writer_keeps_the_first_folder_without_replace(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with write_folder(folder, replace=False) as partial:
        (partial / "second").write_text("second")
        folder.mkdir()  # another process is done first
        (folder / "first").write_text("first")
    assert names(folder) == ["first"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("exists", [True, False], ids=["there", "dangling"])
def test_folder_that_is_a_link_is_written_through_it(tmp_path: Path, exists: bool) -> None:
    disk, folder = tmp_path / "big" / "disk", tmp_path / "merged"
    if exists:
        disk.mkdir(parents=True)
        (disk / "lost+found").mkdir()
        (disk / "model.safetensors").write_text("old")
        (disk / "old.safetensors").write_text("old")
    folder.symlink_to(disk)
    with write_folder(folder) as partial:
        (partial / "model.safetensors").write_text("new")
        (partial / "deep").mkdir()
        (partial / "deep" / "config.json").write_text("{}")
    assert folder.is_symlink()
    assert names(disk) == sorted(["deep", *(["lost+found"] if exists else []), "model.safetensors"])
    assert (folder / "model.safetensors").read_text() == "new"
    assert names(tmp_path) == ["big", "merged"]


def test_failure_behind_a_link_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "model.safetensors").write_text("old")
    (tmp_path / "merged").symlink_to("disk")

    def write() -> None:
        with write_folder(tmp_path / "merged") as partial:
            (partial / "model.safetensors").write_text("half")
            full_disk(0)

    with pytest.raises(OSError, match="No space"):
        write()
    assert names(tmp_path / "disk") == ["model.safetensors"]
    assert (tmp_path / "merged" / "model.safetensors").read_text() == "old"


@pytest.mark.parametrize("other", ["thesis.docx", "photos/"])
def test_refuses_to_empty_a_linked_folder_of_other_things(tmp_path: Path, other: str) -> None:
    path = tmp_path / "disk" / other
    (path.mkdir(parents=True) if other.endswith("/") else write_text(path, "mine"))
    (tmp_path / "merged").symlink_to("disk")
    message = f"holds {path.name}, which is no part of a model"
    with pytest.raises(LlmtuneError, match=message), write_folder(tmp_path / "merged"):
        pass
    assert path.exists()


def test_failed_file_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "recipe.yaml", "text")
    assert names(tmp_path) == []


def test_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"file: cannot be locked and written to: .*; choose another folder"
    with pytest.raises(MachineError, match=message), hold(tmp_path / "file" / ".lock", "busy"):
        pass


def test_what_was_not_used_for_longest_is_removed_until_the_rest_fits(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "newer", "busy", "oldest")):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "data").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "newest" / "link").symlink_to("/dev/null")
    asked: list[str] = []

    def remove(path: Path) -> bool:
        asked.append(path.name)
        return path.name != "busy"

    remove_unused(tmp_path.iterdir(), 350, remove=remove)
    assert asked == ["oldest"]
    remove_unused(tmp_path.iterdir(), 250, [tmp_path / "newest"], remove=remove)
    assert asked == ["oldest", "oldest", "busy", "newer"], "what could not be removed takes its bytes still"
    remove_unused(tmp_path.iterdir(), 0, [tmp_path / "newest", tmp_path / "absent"])
    assert names(tmp_path) == ["newest"]
