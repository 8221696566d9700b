"""A run that went through every step, shared by the tests of its page."""

import json

import pytest

from llmtune.evaluation.step import evaluate
from llmtune.files import read_json
from llmtune.merging.step import merge
from llmtune.run import Run
from tests.support import runs, tiny
from tests.support.pages import falling

EVIL = '<script>alert("x")</script>&amp;<img src=x onerror=alert(1)>'


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is trained, evaluated and merged, on rows that try to break out of the page."""
    folder = tmp_path_factory.mktemp("finished")
    test = [{**row, "prompt": row["prompt"] + EVIL, "completion": "4" + EVIL} for row in tiny.sums(23, start=50)]
    rows = {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.2, "max_length": 400}
    rows["test"] = str(tiny.write_rows(folder / "test.jsonl", test))
    run = runs.trained(folder, data=rows, eval={"suite": "quick", "shots": 1})
    stages = read_json(run.plan_file)["stages"]
    log = falling(stages[0]["rates"])
    run.log_file.write_text("".join(json.dumps(record) + "\n" for record in log))
    evaluate(run)
    with pytest.MonkeyPatch.context() as patch:
        runs.reload_here(patch)
        merge(run)
    return run
