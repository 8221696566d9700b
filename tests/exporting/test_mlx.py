"""Exports to MLX: what mlx-lm reads is held against the merged model; mlx-lm itself is played by transformers here."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmtune.errors import MachineError, ProofError, RecipeError
from llmtune.exporting import mlx, step
from llmtune.exporting.rows import Prompts, answers
from llmtune.merging.proof import logits
from llmtune.model.base import Base, load_model
from llmtune.run import Run
from tests.support import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A trained run, with weights that stand for the merged ones."""
    run = runs.trained(tmp_path_factory.mktemp("mlx"))
    shutil.copytree(run.path.parent / "base", run.merged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_merged", lambda run: run.merged)
        yield run


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the next reading by mlx-lm answers otherwise: an entry of its answer, or `error` in the logits."""
    other: dict[str, Any] = {}

    def play(script: str, task: list[Any], name: str, folder: Path) -> dict[str, Any]:
        if script == mlx.CONVERT:
            shutil.copytree(task[0], task[1])
            return {}
        source, out, texts, prompts, stop, room = task
        model = load_model(Base(Path(source), "mlx", None, None))
        found = {str(row): logits(model, [ids]) + other.get("error", 0.0) for row, ids in enumerate(texts)}
        save_file(found, out)
        given = answers(model, Prompts(prompts, room, set(stop)), "mlx")
        text = {"answers": [[token for token in one if token not in stop] for one in given], "stop": stop}
        text["template"] = (Path(source) / "chat_template.jinja").read_text()
        return text | {name: value for name, value in other.items() if name != "error"}

    monkeypatch.setattr(mlx, "_run", play)
    monkeypatch.setattr(mlx, "find_spec", lambda name: name)
    monkeypatch.setattr(mlx, "version", lambda name: "1.0")
    return other


def test_export_holds_mlxs_answers_against_the_merged_model(
    run: Run, read: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = step.export(run, "mlx")
    assert facts["gap"] <= facts["bound"]
    assert (facts["rows"], facts["equal"], facts["texts"]) == (20, 20, 6)
    assert "exported/mlx/model.safetensors" in facts["files"]
    assert "20 of 20 greedy answers the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"error": 0.01}, "mlx-lm's logits differ by 0.01, over the bound of 0.0001"),
        ({"template": "{{ messages }}"}, "another chat template"),
        ({"stop": [7]}, r"ends answers at tokens \[7\]"),
        ({"answers": [[3]] * 20}, r"answers row 1 by tokens \[3\], the merged model by \["),
    ],
)
def test_export_that_answers_otherwise_leaves_nothing(
    run: Run, read: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    shutil.rmtree(run.exported, ignore_errors=True)
    read |= other
    with pytest.raises(ProofError, match=words):
        step.export(run, "mlx")
    assert not any(run.exported.rglob("*.safetensors"))


def test_refuses_a_disk_that_is_too_small(run: Run, read: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(MachineError, match=r"exporting needs .* of disk, but only 1\.0 kB is free"):
        step.export(run, "mlx")


def test_near_tie_is_no_difference(run: Run) -> None:
    model = load_model(Base(run.merged, "merged", None, None))
    with torch.no_grad():
        last = model(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    first, second = last.topk(2).indices.tolist()
    prompts = Prompts([[5, 6]], 4, {2})
    wide, narrow = float(last[first] - last[second]) * 0.51, float(last[first] - last[second]) * 0.49
    assert mlx._compared(model, prompts, [[first]], [[second]], wide) == {"rows": 1, "equal": 0}
    with pytest.raises(ProofError):
        mlx._compared(model, prompts, [[first]], [[second]], narrow)


def test_names_what_is_missing_and_what_mlx_does_not_know(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"needs mlx-lm, which is not installed; pip install mlx-lm"):
        step.export(run, "mlx")
    monkeypatch.setattr(mlx, "version", lambda name: "1.0")
    unknown = "import sys; sys.exit('ValueError: Model type strange not supported.')"
    with pytest.raises(RecipeError, match=r"mlx-lm 1\.0 knows no models of type strange"):
        mlx._run(unknown, [], "converting", run.path)
    with pytest.raises(ProofError, match=r"converting failed on .*: out of luck"):
        mlx._run("import sys; sys.exit('out of luck')", [], "converting", run.path)
