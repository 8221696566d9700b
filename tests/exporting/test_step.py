"""The frame of every export: what is written, what stays, and what a failure leaves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtune.errors import ProofError, RecipeError
from llmtune.exporting import forms, step
from llmtune.exporting.forms import Export, Form, read_form
from llmtune.run import Run
from tests.support import runs

FAKE = Form("fake", "fake", ("one", "two"), keeps=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A trained run, and a form that writes its type's name to a file; its proof fails while `broken` lies there."""

    def write(export: Export, folder: Path) -> dict[str, Any]:
        (folder / f"{export.type}.bin").write_text(export.type)
        return {"type": export.type}

    def prove(export: Export, folder: Path) -> dict[str, Any]:
        if (export.run.path / "broken").exists():
            raise ProofError("not the tuned model")
        return {"equal": 20}

    writer = SimpleNamespace(check=lambda export: None, write=write, prove=prove, summary=lambda folder, facts: [])
    monkeypatch.setattr(forms, "FORMS", (*forms.FORMS, FAKE))
    monkeypatch.setattr(Form, "writer", lambda form: writer)
    run = Run(tmp_path / "run")
    run.delta.mkdir(parents=True)
    (run.delta / "trained.safetensors").write_bytes(b"1")
    run.mark("train", [run.delta])
    return run


def test_each_type_of_a_form_stays_beside_the_others_and_replaces_only_its_own(run: Run) -> None:
    step.export(run, "fake:one")
    step.export(run, "fake:two")
    (run.exported / "fake" / "mine.bin").write_text("made by another program")
    step.export(run, "fake")
    entry = run.manifest()["steps"]["export"]
    assert entry["forms"] == {
        "fake:two": {"type": "two", "equal": 20, "files": ["exported/fake/two.bin"]},
        "fake:one": {"type": "one", "equal": 20, "files": ["exported/fake/one.bin"]},
    }
    assert sorted(run.verify("export")) == ["exported/fake/one.bin", "exported/fake/two.bin"]
    assert (run.exported / "fake" / "mine.bin").is_file()
    (run.exported / "fake" / "two.bin").write_text("owt")
    with pytest.raises(ProofError, match=r"two\.bin: was changed after `llmtune export`"):
        run.verify("export")


def test_export_without_its_proof_leaves_what_was_there(run: Run) -> None:
    step.export(run, "fake:one")
    before = run.manifest()
    (run.path / "broken").touch()
    with pytest.raises(ProofError, match="not the tuned model"):
        step.export(run, "fake:two")
    assert run.manifest() == before
    assert [file.name for file in run.exported.rglob("*")] == ["fake", "one.bin"]


def test_uses_merged_weights_that_are_there_and_merges_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs.trained(tmp_path)
    runs.reload_here(monkeypatch)
    assert step._merged(run) == run.merged
    assert "merging first" in capsys.readouterr().out
    assert step._merged(run) == run.merged
    assert "merging first" not in capsys.readouterr().out
    config = run.merged / "config.json"
    config.write_bytes(config.read_bytes().replace(b"2", b"3"))
    with pytest.raises(ProofError, match=r"config\.json: was changed after `llmtune merge`"):
        step._merged(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guff", "'guff' is no form of export; there are gguf, ollama.*; did you mean 'gguf'"),
        ("gguf:q8", "'q8' is no type of gguf; there are bf16, f16, .*; did you mean 'q8_0'"),
        ("gguf:Q4_K_M", "only llama.cpp's own program writes q4_k_m; .*llama-quantize FILE.gguf OUT.gguf Q4_K_M"),
    ],
)
def test_refuses_an_unknown_form_or_type_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_form(text)
    assert read_form(" GGUF")[1] == "bf16"


def test_exports_nothing_of_an_untrained_run(run: Run) -> None:
    (run.delta / "trained.safetensors").write_bytes(b"2")
    with pytest.raises(ProofError, match="was changed after `llmtune train`"):
        step.export(run, "fake")
    assert not run.exported.exists()
