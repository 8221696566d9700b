"""vLLM as what runs the models: asked the same questions by token ids, it must give the figures of transformers.

vLLM's interface is played here by transformers: what llmtune sends and reads is tested, not vLLM's kernels.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from llmtune.api.steps import open_with
from llmtune.errors import MachineError, RecipeError
from llmtune.evaluation.step import evaluate
from llmtune.evaluation.vllm import engine as engines
from llmtune.model.base import Base, load_model
from tests.support import runs
from tests.support.suites import mine


@dataclass
class Parameters:
    """What a request asks for."""

    temperature: float
    max_tokens: int
    prompt_logprobs: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False


class Engine:
    """vllm.LLM, played by transformers."""

    started: list["Engine"] = []  # noqa: RUF012

    def __init__(self, model: str, dtype: str, max_model_len: int, **options: Any) -> None:
        self.options = {"dtype": dtype, "max_model_len": max_model_len, **options}
        self.model: Any = load_model(Base(Path(model), model, None, None))
        Engine.started.append(self)

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, Any]], parameters: Parameters, **options: Any) -> list[Any]:
        """Answer each prompt."""
        return [self._answer(prompt["prompt_token_ids"], parameters) for prompt in prompts]

    def _answer(self, ids: list[int], parameters: Parameters) -> Any:
        logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        if parameters.prompt_logprobs:
            assert len(ids) < self.options["max_model_len"]
            scores = logits.log_softmax(-1)
            found: list[Any] = [None]
            for row, token in zip(scores, ids[1:], strict=False):
                pair = {token, int(row.argmax())}
                found.append({one: SimpleNamespace(logprob=float(row[one])) for one in pair})
            return SimpleNamespace(prompt_logprobs=found)
        tokens: list[int] = []
        while len(tokens) < parameters.max_tokens:
            tokens.append(int(self.model(input_ids=torch.tensor([[*ids, *tokens]])).logits[0, -1].argmax()))
            if tokens[-1] in parameters.stop_token_ids:
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """vLLM, as if it were installed."""
    package = ModuleType("vllm")
    vars(package).update(LLM=Engine, SamplingParams=Parameters, TokensPrompt=dict)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    monkeypatch.setattr("llmtune.evaluation.exam._backend", lambda recipe: ())
    Engine.started.clear()
    return Engine


def test_vllm_gives_the_figures_of_transformers(
    tmp_path: Path, vllm: type[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.with_held_out_rows(tmp_path, method={"kind": "full", "lr": 1e-3}, step=0.2, merge={"dtype": "float32"})
    runs.load_tuned(run).save_pretrained(run.merged)
    run.mark("merge", [run.merged])
    folder = tmp_path / "suite"
    folder.mkdir()
    mine(folder)
    (folder / "suite.yaml").write_text("tasks: [held_out, task.yaml]")
    suite = f"eval.suite={folder / 'suite.yaml'}"
    expected = evaluate(open_with(run, [suite, "eval.limit=2"]))
    stored = evaluate(open_with(run, [suite, "eval.backend=vllm", "eval.limit=2"]))
    assert stored["base"]["settings"]["backend"] == "vllm"
    for name in ("base", "tuned"):
        ours, plain = stored[name], expected[name]
        assert [row["output"] for row in ours["rows"]] == [row["output"] for row in plain["rows"]]
        for task, result in plain["results"].items():
            for metric, score in result["metrics"].items():
                assert ours["results"][task]["metrics"][metric]["value"] == pytest.approx(score["value"], abs=1e-5)
    assert len(vllm.started) == 2
    fixed = {"dtype": "float32", "max_model_len": 512, "trust_remote_code": False, "seed": 0}
    assert all(engine.options == fixed for engine in vllm.started)


def test_names_what_vllm_lacks_before_the_base_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.with_held_out_rows(tmp_path, method={"kind": "full", "lr": 1e-3})
    with_vllm = open_with(run, ["eval.backend=vllm"])
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="vllm is not installed; pip install vllm"):
        evaluate(with_vllm)
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    with pytest.raises(RecipeError, match=r"vllm asks the merged weights; first: llmtune merge"):
        evaluate(with_vllm)
