"""`plan --methods`: what each method takes, within limits, and one recommended with the command that takes it."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from llmtune import terminal
from llmtune.advising import advice, methods
from llmtune.advising.limits import Limits
from llmtune.advising.methods import MethodPrediction, predict_methods
from llmtune.advising.recall import remember
from llmtune.arms.arm import ARMS, Arm
from llmtune.cli import main
from llmtune.errors import RecipeError
from llmtune.estimate.memory import forecast
from llmtune.estimate.passes import setting_of
from llmtune.recipe.sections import Recipe
from llmtune.timing import rate
from llmtune.training.prepare import layout_of, plan_alone
from tests.advising.test_recall import comparison
from tests.support import tiny


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for labels over a tiny base."""
    folder = tmp_path_factory.mktemp("my rows")
    base = tiny.save_base(folder / "base", blocks=2)
    rows = [{"prompt": f"is {n} even?", "completion": ["yes", "no"][n % 2]} for n in range(160)]
    train = tiny.write_rows(folder / "train.jsonl", rows[:120])
    data = {"train": str(train), "test": str(tiny.write_rows(folder / "test.jsonl", rows[120:])), "eval_fraction": 0}
    sections: dict[str, Any] = {"data": data, "train": {"epochs": 4, "batch_size": 8}, "eval": {"suite": "none"}}
    return tiny.write_recipe(folder / "recipe.json", base, train, {"kind": "full", "lr": 1e-3}, **sections)


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose products take their time: a billion operations a second."""
    monkeypatch.setattr("llmtune.timing.seconds.cpu_rate", lambda *_: 1e9)
    monkeypatch.setattr(terminal.console, "width", 300)


def seconds(recipe: Path, name: str, *overrides: str) -> float:
    """The predicted seconds of one arm."""
    (one,) = predict_methods(Recipe.load(recipe, overrides), [ARMS[name]])
    assert one.fits, one.reason
    assert one.seconds is not None
    return one.seconds


def test_seconds_on_a_cpu_follow_from_operations_epochs_and_cached_blocks(recipe: Path) -> None:
    settings = Recipe.load(recipe, ["method=frozen"])
    layout, rows = layout_of(settings), methods.read_rows(settings).work.lengths
    (stage,) = forecast(layout, setting_of(settings, 1, "cpu"), rows.longest).stages
    each_pass = stage.trace.products.forward / stage.trace.tokens * rows.tokens / 0.6e9
    cached, computed = (seconds(recipe, "frozen", f"memory.frozen_blocks={way}") for way in ("cache", "recompute"))
    # One of two blocks runs once in place of four times.
    assert computed - cached == pytest.approx(3 * each_pass / 2, rel=1e-6)
    full = seconds(recipe, "full")
    assert seconds(recipe, "full", "train.epochs=8") == pytest.approx(2 * full)
    assert full / 2 < seconds(recipe, "full", "data.eval_fraction=0.5") < full
    assert seconds(recipe, "qlora") > seconds(recipe, "lora")


def test_plan_tells_the_time_on_this_machine(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for epochs in (4, 8):
        assert main(["plan", str(recipe), "--json", "--set", f"train.epochs={epochs}"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["memory"]["seconds"])
    assert answers[1] == pytest.approx(2 * answers[0], rel=0.01)
    assert answers[0] > 0
    assert main(["plan", str(recipe)]) == 0
    assert "; trains for about 0:0" in (out := capsys.readouterr().out)
    assert ", at the rate of this machine's matrix products" in out


def test_arm_that_cannot_be_says_why(recipe: Path) -> None:
    arms = [Arm("deep", ("method={kind: frozen, reach: 9}",)), Arm("as it is", ())]
    deep, own = predict_methods(Recipe.load(recipe), arms)
    assert (deep.fits, deep.bytes, own.fits) == (False, None, True)
    assert "method.reach: reach 9 is beyond the model" in deep.reason


def told(recipe: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What the command gives as JSON."""
    assert main(["plan", str(recipe), "--methods", "--json", *words]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_recommends_one_method_and_says_what_is_known(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kept: Path
) -> None:
    few = ("full", "frozen", "lora")
    monkeypatch.setattr(advice, "ARMS", {name: ARMS[name] for name in few})
    answer = told(recipe, capsys)
    by_name = {one["arm"]: one for one in answer["methods"]}
    assert tuple(by_name) == few
    assert [name for name, one in by_name.items() if one["own"]] == ["full"]
    assert (answer["facts"]["kind"], answer["facts"]["rows"], answer["facts"]["held_out"]) == ("labels", 120, 40)
    assert answer["recommended"]["arm"] == "frozen"
    assert shlex.split(answer["command"]) == ["llmtune", "run", str(recipe), "--set", "method=frozen"]
    assert answer["tf_idf"]["rows"] == 40
    # What was measured on like data counts more than rules.
    assert not kept.exists()
    remember(comparison(base=str(recipe.parent / "base"), rows=120, frozen=[0.25, 0.25], lora=[1.0, 1.0]))
    assert main(["plan", str(recipe), "--methods"]) == 0
    out = capsys.readouterr().out
    assert "full (the recipe's)" in out
    assert "compare measured on" in out
    assert "a linear model over TF-IDF reaches" in out
    assert "40 held-out rows in 1 s: a tuned model has to beat that" in out
    assert out.splitlines()[-1] == f"next: llmtune run {shlex.quote(str(recipe))} --set method=lora"


def test_facts_have_the_steps_of_the_plan(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "ARMS", {name: ARMS[name] for name in ("full", "lora")})
    settings = Recipe.load(recipe, ["train.epochs=0.35"])
    facts = advice.advise(settings, None, Limits()).facts
    assert facts.steps == plan_alone(settings, 0).steps == 6
    assert facts.epochs == 6 / 15


def test_limits_leave_methods_out_and_name_the_nearest_that_works(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [("full", 4e9, 900.0, True), ("frozen", 2e9, 300.0, True), ("lora", 1e9, 600.0, True)]
    predictions = [MethodPrediction(name, round(size), time, fits, "so") for name, size, time, fits in known]
    predictions.append(MethodPrediction("qlora", 10**8, 1.0, False, "bitsandbytes is missing"))
    monkeypatch.setattr(advice, "predict_on", lambda *_: predictions)
    monkeypatch.setattr(advice, "ARMS", {one.arm: ARMS[one.arm] for one in predictions})
    monkeypatch.setattr("llmtune.cli.methods._linear_model", lambda _: None)

    def beyond(*words: str) -> tuple[dict[str, str], str]:
        answer = told(recipe, capsys, *words)
        return {one["arm"]: one["beyond"] for one in answer["methods"] if one["beyond"]}, answer["command"]

    missing = {"qlora": "bitsandbytes is missing"}
    assert beyond() == (missing, shlex.join(["llmtune", "run", str(recipe), "--set", "method=frozen"]))
    over, command = beyond("--budget", "8m", "--memory", "3GB")
    assert over == {
        "full": "needs 4.0 GB, over --memory 3.0 GB",
        "lora": "takes 10:00, over --budget 8:00",
        **missing,
    }
    assert command.endswith("method=frozen")
    assert beyond("--memory", "1.5GB")[1].endswith("method=lora")
    assert beyond("--memory", "500MB")[1] == "the smallest is lora: --memory 1.00GB"
    assert beyond("--budget", "1m")[1] == "the quickest is frozen: --budget 5.0m, or 20% of the recipe's epochs"
    over, command = beyond("--budget", "1m", "--memory", "1.5GB")
    assert command == "the quickest is lora: --budget 10.0m, or 10% of the recipe's epochs"
    predictions[:] = [one for one in predictions if not one.fits] + [
        MethodPrediction(name, 10, None, False, "") for name in ("full", "lora")
    ]
    assert beyond()[1].startswith("no method fits; a smaller base")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "--budget", "soon"], "--budget soon: is no time; try 20m, 90s or 1.5h"),
        (["--methods", "--budget", "0m"], "--budget 0m: is no time"),
        (["--methods", "--memory", "8 apples"], "--memory 8 apples: is no memory; try 8GB, 512MB or 7.5GiB"),
        (["--budget", "20m"], "--budget 20m: chooses among methods; add --methods"),
        (["--memory", "8GB"], "--memory 8GB: chooses among methods; add --methods"),
        (["--methods", "--gpu", "h1000"], "--gpu h1000: is no card that llmtune knows; did you mean 'h100'?"),
    ],
)
def test_bad_limits_are_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["plan", str(recipe), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_reads_times_and_sizes_as_people_write_them() -> None:
    assert Limits.of("1.5h", "7.5GiB") == Limits(90.0, round(7.5 * 2**30))
    assert Limits.of("90s", "8") == Limits(1.5, 8 * 10**9)
    with pytest.raises(RecipeError):
        Limits.of("1e9999h", None)


def test_rate_of_a_machine_is_measured_once_a_day_and_the_best_is_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    layout, measured = layout_of(Recipe.load(recipe)), iter([5.0, 3.0, 7.0])
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(rate, "_measure", lambda *_: next(measured))
    assert [rate.cpu_rate(layout, torch.float32) for _ in range(3)] == [5.0] * 3
    file = tmp_path / "rates.json"
    for expected in (5.0, 7.0):
        file.write_text(json.dumps({k: {**v, "date": "2026-01-01"} for k, v in json.loads(file.read_text()).items()}))
        assert rate.cpu_rate(layout, torch.float32) == expected
    file.write_text('{"damaged": []}')
    monkeypatch.undo()
    monkeypatch.setattr(rate, "SECONDS", 0.01)
    assert rate._measure((32, 64), torch.float32) > 0
