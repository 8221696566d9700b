"""What cannot be searched is refused in one line before anything trains."""

from pathlib import Path

import pytest

from llmtune.errors import LlmtuneError, RecipeError
from llmtune.searching.space import Choice, Range
from llmtune.tuning.over import read_space
from llmtune.tuning.request import read_request
from llmtune.tuning.step import tune
from tests.support import tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A recipe whose base and rows are not there: nothing of them is needed to refuse it."""
    return tiny.write_recipe(tmp_path / "recipe.json", tmp_path / "base", tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("method.lr", "write a range such as"),
        ("method.lr=1e-2..1e-3", "the range is empty"),
        ("method.lr=1..x", "x is no number"),
        ("method.lr=0..1:log", "begins above 0"),
        ("method.lr=1e-4..1e-2:lin", "lin is no scale"),
        ("method.lr=0.1", "is one value, which --set method.lr=0.1 sets"),
        ("method.lr=0.1,0.1", "gives one value twice"),
        ("method.lrr=0.1,0.2", "unknown key; did you mean 'lr'?"),
        ("method.lr=-1..1", "--over method.lr=-1..1: method.lr: a number > 0 is expected"),
        ("method.adapter.rank=8,16", "needs a kind"),
        ("eval.shots=1,2", "changes nothing of the training"),
        ("data.eval_fraction=0.1,0.2", "changes what the validation loss is measured on"),
    ],
)
def test_refuses_what_cannot_be_searched(file: Path, over: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_request(file, [over])
    assert str(error.value).startswith("--over ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "--trials 0: at least 1"),
        ({"minutes": 0}, "--minutes 0: more than 0"),
        ({"set": ["data.eval_fraction=0"]}, "data.eval: trials are compared by validation loss"),
        ({"set": ["launch.accelerate=fsdp2"]}, "launch.accelerate: a trial trains in one process"),
        ({"on": "rays"}, "--on rays: is not one of these; did you mean 'ray'?"),
        ({"out": "."}, "is not empty and holds no study"),
        ({"out": "s3://bucket/tune"}, "--out s3://bucket/tune: a study is a SQLite file"),
        ({"out": "abfs://bucket/tune"}, "--out abfs://bucket/tune: a study is a SQLite file"),
    ],
)
def test_refuses_what_cannot_be_run(file: Path, options: dict[str, object], message: str) -> None:
    options = {**options, "out": file.parent if options.get("out") == "." else options.get("out", file.parent / "out")}
    with pytest.raises(LlmtuneError) as error:
        tune(file, ["method.lr=1e-4..1e-2:log"], **options)  # type: ignore[arg-type]
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_misspelt_adapter_of_a_short_method_is_told_with_the_nearest(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--over method.adapter=ia3,lorra: .*got 'lorra'; did you mean 'lora'"):
        read_request(file, ["method.adapter=ia3,lorra"], set=["method=lora"])
    request = read_request(file, ["method.adapter=ia3,lora"], set=["method=lora"])
    assert request.with_values({"method.adapter": "ia3"}).method.adapter.kind == "ia3"


def test_reads_ranges_and_values() -> None:
    space = read_space(["a=1e-4..1e-2:log", "b=8,16", "c=[q, k],[v]", "d=1..3", "e=1.0..3"])
    assert space["a"] == Range(1e-4, 1e-2, log=True)
    assert space["b"] == Choice((8, 16))
    assert space["c"] == Choice(("[q, k]", "[v]"))
    assert (space["d"], space["e"]) == (Range(1, 3, whole=True), Range(1.0, 3.0))
