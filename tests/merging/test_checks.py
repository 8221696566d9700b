"""A merge knows before it works what it needs, shows what it does, and says in one line what it lacks."""

import errno
import gzip
import json
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from llmtune import recipe, working
from llmtune.errors import MachineError, ProofError
from llmtune.estimate.memory import merge_bytes
from llmtune.launch.guard import guarded_step
from llmtune.merging import checks, proof, step
from llmtune.merging.checks import count_weights, disk_bytes
from llmtune.merging.step import merge
from llmtune.model.base import Base, build_skeleton
from llmtune.model.files.locate import locate_base
from llmtune.recipe.sections import Model
from llmtune.run import Run
from llmtune.working import Work
from tests.support import runs, tiny


def nothing_left(run: Run) -> bool:
    """Tell whether no merged folder is there, whole or partial, and none is recorded."""
    return not [path for path in run.path.iterdir() if "merged" in path.name] and not run.done("merge")


def refuse(*_: Any, **__: Any) -> Any:
    """Fail where nothing may be loaded yet."""
    raise AssertionError("work began")


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("mixtral", False)])
def test_counts_every_weight_once_on_disk_and_experts_again_in_fp32(tmp_path: Path, kind: str, tied: bool) -> None:
    base = locate_base(Model(base=str(tiny.save_base(tmp_path / "base", kind, tied=tied))))
    numbers = {name: one.numel() for name, one in tiny.model(kind, tied=tied).named_parameters()}
    assert count_weights(base) == sum(numbers.values())
    experts = sum(count for name, count in numbers.items() if "experts" in name)
    assert disk_bytes(base, "bfloat16") == 2 * count_weights(base) + 4 * experts


def test_refuses_too_little_disk_before_any_work_and_keeps_the_old_folder(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.trained(tmp_path)
    merge(run)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(step, "merge_by_shards", refuse)
    size = sum(file.stat().st_size for file in run.merged.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(step, "disk_bytes", lambda base, dtype: 2 * size)
    with pytest.raises(MachineError, match=r"run: merging needs .*B of disk, but only .*B is free"):
        merge(run)
    assert run.done("merge"), "the earlier merge is as it was"
    monkeypatch.setattr(step, "disk_bytes", lambda base, dtype: size)
    with pytest.raises(AssertionError, match="work began"):
        merge(run)


def test_refuses_too_little_memory_before_any_work(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.trained(tmp_path)
    monkeypatch.setattr(step, "merge_by_shards", refuse)
    base = locate_base(run.recipe().model)
    largest = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 32  # a block
    needed = 2 * count_weights(base) + 12 * largest
    skeleton = build_skeleton(base)
    assert merge_bytes(skeleton, torch.bfloat16) == merge_bytes(skeleton, torch.bfloat16, whole=True) == needed
    monkeypatch.setattr(checks, "free_bytes", lambda device: needed - 1)
    words = (
        r"^merging holds a file of weights in bfloat16 and a block of them in float32, 165 kB, and 165 kB of memory "
        r"is free; "
        r"free .* merge.enabled: false; "
        r"training is safe in .*delta; continue with: llmtune run "
    )
    with pytest.raises(MachineError, match=words), guarded_step(run, "merge"):
        merge(run)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(checks, "free_bytes", lambda device: needed)
    with pytest.raises(AssertionError, match="work began"):
        merge(run)
    monkeypatch.setattr("llmtune.estimate.memory.SHARD_BYTES", 1000)
    assert checks.memory_words(base, "bfloat16")[0] == 1000 + 12 * largest
    tall = Base(tiny.save_base(tmp_path / "tall", blocks=8), "tall", None, None)
    needed = 4 * count_weights(tall)
    words = f"comparing with the trained 4-bit model holds the weights in float32, {needed / 1000:.0f} kB"
    assert checks.memory_words(tall, "bfloat16", bits=4) == (needed, words)


def test_a_merged_folder_behind_a_link_needs_room_beside_the_old_one(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.trained(tmp_path)
    (tmp_path / "disk").mkdir()
    run.merged.symlink_to(tmp_path / "disk")
    merge(run)
    usage = shutil.disk_usage(tmp_path)
    size = sum(file.stat().st_size for file in run.merged.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(step, "disk_bytes", lambda base, dtype: size)
    with pytest.raises(MachineError, match=r"run: merging needs .*B of disk, but only 1\.0 kB is free"):
        merge(run)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "merge: no space is left on the disk; mend that"),
        (
            MemoryError(),
            r"merge: out of memory: .*; merging holds a file of weights in .* float32, [\d.]+ kB; .* merge.enabled: f",
        ),
    ],
)
def test_lack_while_writing_is_one_line_and_leaves_nothing(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    run = runs.trained(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("llmtune.merging.shards.write.save_file", fail)
    with pytest.raises(MachineError, match=message):
        merge(run)
    assert nothing_left(run)


def test_killed_proof_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.trained(tmp_path)
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=lambda *_, **__: killed))
    with pytest.raises(MachineError, match=r"the process that reads the merged folder was killed \(signal 9\)"):
        merge(run)
    assert nothing_left(run)


def test_failing_proof_names_what_stock_transformers_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.trained(tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: no such model")
    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(ProofError, match="stock transformers cannot load the merged folder: ValueError: no such model"):
        merge(run)
    assert nothing_left(run)


class Recorded(Work):
    """A piece of work that is kept, with all that was done of it."""

    every: ClassVar[list["Recorded"]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.every.append(self)


def test_shows_every_part_of_a_merge(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(working, "Work", Recorded)
    monkeypatch.setattr(Recorded, "every", [])
    run = runs.trained(tmp_path)
    Recorded.every.clear()
    facts = merge(run)
    names = [work.name for work in Recorded.every]
    assert names[0] == "checking what is merged"
    for part in (
        "merging",
        "running the base model, a block at a time",
        "loading the delta",
        "running the tuned model, a block at a time",
        "adding the delta to the weights, a block at a time",
        "rounding the merged weights, a block at a time",
        "writing the merged weights in bfloat16",
        "reading the merged folder with stock transformers in a fresh process",
        "hashing the merged folder",
    ):
        assert part in names
    written = [work.share for work in Recorded.every if work.unit == "tensors"]
    assert written == [1]
    out = capsys.readouterr().out
    assert f"merged, bfloat16: on {facts['texts']} texts, largest logit gap" in out
    assert f"{max(facts['gap_in_memory'], facts['gap_on_disk']):.2g} without rounding" in out
    assert facts["texts"] == 6


def test_merges_again_in_another_data_type(tmp_path: Path, quick: None) -> None:
    run = runs.trained(tmp_path)
    merge(run)
    run.recipe_file.write_text(run.recipe_file.read_text().replace("dtype: bfloat16", "dtype: float32"))
    assert recipe.load(run.recipe_file).merge.dtype == "float32"
    facts = merge(run)
    assert (facts["dtype"], run.manifest()["steps"]["merge"]["dtype"]) == ("float32", "float32")
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(run.merged / "model.safetensors").values()} == {torch.float32}


def test_compares_logits_on_rows_of_any_source(tmp_path: Path) -> None:
    rows = tiny.sums(9)
    files = {"rows.json": json.dumps(rows), "rows.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows)}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.jsonl").write_text(files["rows.jsonl"])
    (tmp_path / "text.jsonl").write_text('{"text": "Once upon a time"}\n')
    chat = [*map(str, (tmp_path / name for name in (*files, "rows.json.gz", "folder", "folder/*.jsonl")))]
    mixture = [{"source": str(tmp_path / name), "fraction": 0.5} for name in ("rows.jsonl", "rows.json.gz")]
    for train in (*chat, mixture):
        settings = recipe.load(tiny.write_recipe(tmp_path / "r.json", tmp_path, tmp_path, data={"train": train}))
        texts = proof.probes(settings)
        assert [*map(json.loads, texts[3:])] == [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            for row in rows[:3]
        ]
    for train, more in (
        (str(tmp_path / "text.jsonl"), ["Once upon a time"]),
        (str(tmp_path / "gone.jsonl"), []),
        ("acme/no-such-rows", []),
    ):
        settings = recipe.load(tiny.write_recipe(tmp_path / "r.json", tmp_path, tmp_path, data={"train": train}))
        assert proof.probes(settings) == [*proof.TEXTS, *more]
