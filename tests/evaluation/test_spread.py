"""An evaluation over several processes gives what one process gives."""

import math
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError, MachineError, ProofError
from llmtune.evaluation.results import Result, compare
from llmtune.evaluation.spread import children, share
from llmtune.evaluation.spread.children import wants_children
from llmtune.evaluation.step import evaluate
from llmtune.launch.ending import Exit
from llmtune.recipe.sections import Launch
from llmtune.run import Run
from tests.support import tiny
from tests.support.runs import QUICK, with_held_out_rows
from tests.support.suites import mine

TWO = Launch(accelerate="multi_cpu", processes=2)


def test_work_is_dealt_out_and_gathered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(place, "a" * (place * 7 % 5)) for place in range(11)]
    parts: list[list[tuple[int, int]]] = []
    done: list[list[int]] = []

    def work(items: list[tuple[int, str]]) -> list[int]:
        done.append([place for place, _ in items])
        return [place * 10 for place, _ in items]

    def gather(part: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        parts.append(part)
        return parts

    monkeypatch.setattr(share, "world", lambda: 3)
    monkeypatch.setattr(share, "gather", gather)
    for rank in (0, 1, 2):
        monkeypatch.setattr(share, "rank", lambda rank=rank: rank)
        if rank < 2:
            with pytest.raises(KeyError):  # what the others did is not there yet
                share.spread(texts, work, lambda item: len(item[1]), lambda item: item[0] // 2)
        else:
            answers = share.spread(texts, work, lambda item: len(item[1]), lambda item: item[0] // 2)
    assert answers == [place * 10 for place in range(11)]
    assert sorted(len(part) for part in done) == [3, 4, 4]
    assert all((place in part) == (place + 1 in part) for part in done for place in range(0, 10, 2))


@pytest.mark.parametrize(
    ("launch", "several"),
    [
        (TWO, True),
        (Launch(), False),
        (Launch(processes=2), True),
        (Launch(accelerate="ddp", processes=2), False),  # trained on GPUs that this machine lacks
        (Launch(accelerate="multi_node", processes=2), False),
        (Launch(accelerate="gone.yaml"), False),
    ],
)
def test_several_processes_evaluate_where_the_launch_section_means_some(launch: Launch, several: bool) -> None:
    assert wants_children(launch) == several


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    mine(folder)
    (folder / "suite.yaml").write_text("tasks: [held_out, task.yaml]\n")
    evaluation = {**QUICK, "suite": str(folder / "suite.yaml"), "forgetting": True}
    base = tiny.save_base(tmp_path / "base", initializer_range=0.3)
    run = with_held_out_rows(tmp_path, base=base, eval=evaluation)
    one = evaluate(run)
    two = evaluate(Run(run.path, run.recipe().model_copy(update={"launch": TWO})))
    for name in ("base", "tuned"):
        assert two[name]["rows"] != []
        assert two[name]["results"].keys() == one[name]["results"].keys()
        for task, result in two[name]["results"].items():
            same(result, one[name]["results"][task])
    assert [row["output"] for row in two["tuned"]["rows"]] == [row["output"] for row in one["tuned"]["rows"]]
    with pytest.raises(ProofError, match="cannot be compared: processes is 2 in one and 1 in the other"):
        compare(two["tuned"], one["base"])
    assert run.recipe().launch.processes == 2


@pytest.mark.parametrize(
    ("ended", "kind", "code", "message"),
    [
        (Exit(2, "suite.yaml:1: tasks: is missing"), LlmtuneError, 2, "suite.yaml:1: tasks: is missing"),
        (Exit(137), MachineError, 3, "a process was killed (signal 9), probably by the system for lack of memory"),
        (Exit(1), ProofError, 5, "evaluation: a process ended with code 1"),
        (Exit(139), ProofError, 5, "evaluation: a process crashed (signal 11, SIGSEGV)"),
    ],
)
def test_what_ends_a_process_is_told_and_other_settings_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Exit, kind: type[LlmtuneError], code: int, message: str
) -> None:
    run = Run(tmp_path)
    file = tiny.write_recipe(tmp_path / "recipe.yaml", tmp_path, tmp_path / "rows.jsonl")
    before = file.read_text()
    monkeypatch.setattr(children, "run_module", lambda *_: ended)
    with pytest.raises(kind) as raised:
        evaluate(Run(run.path, run.recipe().model_copy(update={"launch": TWO})))
    assert message in str(raised.value)
    assert raised.value.exit_code == code
    assert file.read_text() == before


def same(result: Result, other: Result) -> None:
    """Assert that two results hold the same figures, up to the rounding of other batches."""
    assert result["n"] == other["n"]
    for metric, score in result["metrics"].items():
        assert score["value"] is not None
        assert math.isclose(score["value"], other["metrics"][metric]["value"] or 0, rel_tol=1e-5), metric
