"""A run knows its base again by the SHA-256 of its files, and refuses another one by name."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmtune import files as file_tools
from llmtune import recipe
from llmtune.answering.speakers import load_speakers
from llmtune.errors import LlmtuneError, ProofError, RecipeError
from llmtune.evaluation.step import evaluate
from llmtune.files import read_json, write_json
from llmtune.merging.step import merge
from llmtune.model.base import Base
from llmtune.model.files import fingerprints
from llmtune.model.files.converted import Converted
from llmtune.model.files.fingerprints import fingerprint_base, weights_digest
from llmtune.run import Run
from llmtune.training.loop import train
from llmtune.training.prepare import prepare
from tests.support import runs, tiny


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of each test's own."""
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read to be hashed."""
    names: list[str] = []
    real = file_tools.fingerprint

    def record(path: Path) -> dict[str, object]:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(fingerprints, "fingerprint", record)
    return names


def change_weights(folder: Path) -> None:
    """Change one value of a base's weights; size and names stay."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_reads_a_file_once_until_it_changes(tmp_path: Path, hashed: list[str]) -> None:
    base = Base(tiny.save_base(tmp_path / "base"), "b", None, None)
    (base.folder / "README.md").write_text("not part of the model")
    first = fingerprint_base(base)
    small = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(first) == {"model.safetensors", *small}
    assert sorted(hashed) == sorted(first)
    assert fingerprint_base(base) == first
    assert len(hashed) == len(first)
    file = base.folder / "model.safetensors"
    times = file.stat()
    change_weights(base.folder)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # even where somebody puts the time back
    second = fingerprint_base(base)
    assert hashed[len(first) :] == ["model.safetensors"]
    assert [name for name in first if first[name] != second[name]] == ["model.safetensors"]
    assert second["model.safetensors"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_cache_that_is_damaged_or_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base(tiny.save_base(tmp_path / "base"), "b", None, None)
    first = fingerprint_base(base)
    memo = next((tmp_path / "cache" / "fingerprints").iterdir())
    for content in ("", "[]", '{"model.safetensors": 1}', '{"model.safetensors": {"stamp": null, "facts": {}}}'):
        memo.write_text(content)
        assert fingerprint_base(base) == first
    monkeypatch.setenv("LLMTUNE_CACHE", str(base.folder / "config.json" / "no-folder"))
    assert fingerprint_base(base) == first


def test_takes_the_hash_of_a_large_file_from_the_hub(tmp_path: Path, hashed: list[str]) -> None:
    stored = tiny.save_base(tmp_path / "stored")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (file for file in stored.iterdir() if file.is_file()):
        content = file.read_bytes()
        is_large = file.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if is_large else hashlib.sha1(content).hexdigest()
        shutil.copy(file, blobs / name)
        (snapshot / file.name).symlink_to(blobs / name)
    assert fingerprint_base(Base(snapshot, "a/b", "abc", "a/b")) == fingerprint_base(Base(stored, "s", None, None))
    assert hashed.count("model.safetensors") == 1


def test_a_converted_base_is_its_weights(tmp_path: Path) -> None:
    converted = Base(tiny.save_base(tmp_path / "base"), "m.gguf", "0" * 64, None, Converted("m.gguf", "0" * 64, {}))
    assert set(fingerprint_base(converted)) == {"model.safetensors"}


def test_one_digest_for_weights_and_configuration(tmp_path: Path) -> None:
    base = Base(tiny.save_base(tmp_path / "base"), "b", None, None)
    before = weights_digest(base)
    (base.folder / "chat_template.jinja").write_text("{{ messages }}")
    assert weights_digest(base) == before
    change_weights(base.folder)
    assert weights_digest(base) != before


STEPS: dict[str, tuple[Callable[[Run], object], type[LlmtuneError]]] = {
    "evaluation": (evaluate, RecipeError),
    "merge": (merge, ProofError),
    "chat": (load_speakers, RecipeError),
}


@pytest.mark.parametrize("step", STEPS)
def test_every_step_refuses_a_base_that_changed(tmp_path: Path, step: str) -> None:
    done = runs.with_held_out_rows(tmp_path)
    act, kind = STEPS[step]
    folder = Path(done.recipe().model.base)
    change_weights(folder)
    with pytest.raises(kind) as caught:
        act(done)
    assert str(caught.value) == (
        f"{folder / 'model.safetensors'}: changed since the run {done.path} was made; "
        "put the base back as it was, or start a new run with --out"
    )
    assert not done.merged.exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("chat_template.jinja", lambda file: file.write_text(tiny.CHATML + " "), "changed since"),
        ("generation_config.json", lambda file: file.unlink(), "is missing since"),
        ("added_tokens.json", lambda file: file.write_text("{}"), "is new since"),
    ],
)
def test_names_the_small_file_that_changed(
    tmp_path: Path, name: str, change: Callable[[Path], object], words: str
) -> None:
    done = runs.trained(tmp_path)
    file = Path(done.recipe().model.base) / name
    change(file)
    with pytest.raises(ProofError, match=f"{name}: {words}"):
        merge(done)


def test_training_is_not_resumed_on_another_base(tmp_path: Path) -> None:
    file = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sums(20))
    base = tiny.save_base(tmp_path / "base")
    settings = recipe.load(tiny.write_recipe(tmp_path / "r.yaml", base, file))
    run = prepare(settings, tmp_path / "run", 0)
    change_weights(base)
    assert prepare(settings, tmp_path / "run", 0).manifest()["base"]  # nothing is trained yet
    (run.checkpoints / "step-000001").mkdir(parents=True)
    change_weights(base)
    for resume in (lambda: train(run), lambda: prepare(settings, tmp_path / "run", 0)):
        with pytest.raises(RecipeError, match=r"model\.safetensors: changed since the run"):
            resume()


def test_delta_records_the_files_of_its_base(tmp_path: Path) -> None:
    done = runs.trained(tmp_path)
    folder = Path(done.recipe().model.base)
    files = read_json(done.delta / "base.json")["files"]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert files["model.safetensors"]["sha256"] == digest
    assert done.manifest()["base"] == {"name": str(folder), "revision": None, "files": files}


def test_a_run_of_an_older_version_is_taken_as_it_is(tmp_path: Path) -> None:
    done = runs.trained(tmp_path)
    manifest = done.manifest()
    write_json(done.manifest_file, {key: value for key, value in manifest.items() if key != "base"})
    change_weights(Path(done.recipe().model.base))
    assert [speaker.name for speaker in load_speakers(done)] == ["base", "tuned"]
