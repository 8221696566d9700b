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
from llmtune.evaluation import step
from llmtune.evaluation.harness import score_tasks
from llmtune.evaluation.step import evaluate
from llmtune.evaluation.tasks import load_tasks
from llmtune.evaluation.vllm import engine as engines
from llmtune.evaluation.vllm.engine import VllmModel
from llmtune.inference.placement import Placement
from llmtune.model.base import Base, build_skeleton, load_model
from llmtune.run import Run
from tests.support import runs, tiny
from tests.support.suites import load, mine


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


def merged(folder: Path, rows: list[dict[str, Any]] | None = None) -> Run:
    """A trained run with its merged weights."""
    full = {"kind": "full", "lr": 1e-3}
    run = runs.with_held_out_rows(folder, rows, method=full, step=0.2, merge={"dtype": "float32"})
    runs.load_tuned(run).save_pretrained(run.merged)
    run.mark("merge", [run.merged])
    return run


def test_vllm_gives_the_figures_of_transformers(tmp_path: Path, vllm: type[Engine]) -> None:
    run = merged(tmp_path)
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


def test_a_row_that_fills_the_context_is_not_asked_by_vllm(tmp_path: Path, vllm: type[Engine]) -> None:
    """Rows of 510 to 515 tokens, of which transformers reads those up to 512, and vLLM those up to 511."""
    rows = [{"id": f"long-{n}", "prompt": chr(97 + n) * (488 + n), "completion": f"{n}{n}"} for n in range(5)]
    run = merged(tmp_path, [*rows, *tiny.sums(25)])
    plain, ours = (
        {row["id"]: row["loss"] for row in evaluate(open_with(run, [f"eval.backend={name}"]))["tuned"]["rows"]}
        for name in ("transformers", "vllm")
    )
    assert len(ours) == len(plain) - 1 > 0
    assert [plain[name] for name in ours] == pytest.approx(list(ours.values()), abs=1e-5)


def test_windows_of_plain_texts_leave_vllm_room_for_a_token(tmp_path: Path, vllm: type[Engine]) -> None:
    run = merged(tmp_path, [{"text": f"There were {n} geese on the lake. " * 20} for n in range(30)])
    for name, window in (("transformers", 512), ("vllm", 511)):
        stored = evaluate(open_with(run, [f"eval.backend={name}"]))
        assert stored["settings"]["texts"]["window"] == window
        assert stored["tuned"]["results"]["held_out"]["n"] == 5


def test_windows_that_roll_over_a_text_leave_vllm_room_for_a_token(tmp_path: Path, vllm: type[Engine]) -> None:
    # No two windows hold the same tokens: lm-eval would score the ends of one as those of the other.
    texts = [{"text": " ".join(str(n**2) for n in range(size))} for size in (9, 120, 250)]
    rows = tiny.write_rows(tmp_path / "texts.jsonl", texts)
    keys: dict[str, Any] = {"dataset_kwargs": {"data_files": {"test": str(rows)}}, "doc_to_choice": None}
    keys |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    keys |= {"metric_list": [{"metric": "byte_perplexity"}], "num_fewshot": 0}
    base = Base(tiny.save_base(tmp_path / "base", initializer_range=0.3), "base", None, None)
    served: Any = VllmModel(build_skeleton(base), Engine(str(base.folder), "float32", 512), torch.float32, 512)
    plain: Any = load_model(base)
    plain.config.max_position_embeddings = 510  # lm-eval's windows are a token longer than what they score
    ours, expected = (
        score_tasks(model, tiny.tokenizer(), load_tasks(load(tmp_path, mine(tmp_path, **keys))))["mine"]
        for model in (served, plain)
    )
    values = [result["metrics"]["byte_perplexity"]["value"] for result in (ours, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert (ours["n"], ours["truncated"]) == (3, 0)
    assert served.is_finite([5] * 512)


def test_results_name_the_gpu_that_vllm_answers_on_and_another_one_is_asked_again(
    tmp_path: Path, vllm: type[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_with(merged(tmp_path), ["eval.backend=vllm"])
    monkeypatch.setattr(step, "place", lambda recipe, base: Placement(torch.device("cuda", 0), torch.float32))
    asked = []
    for card in ("A100", "A100", "H100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, card=card: card)
        assert evaluate(run)["base"]["settings"]["device"] == "cuda"
        asked.append(bool(run.manifest()["steps"]["eval"]["base_answers"]["asked"]))
    assert asked == [True, False, True]


def test_names_what_vllm_lacks_before_the_base_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.with_held_out_rows(tmp_path, method={"kind": "full", "lr": 1e-3})
    with_vllm = open_with(run, ["eval.backend=vllm"])
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="vllm is not installed; pip install vllm"):
        evaluate(with_vllm)
    monkeypatch.setattr(engines, "find_spec", lambda name: name)
    with pytest.raises(RecipeError, match=r"vllm asks the merged weights; first: llmtune merge"):
        evaluate(with_vllm)
