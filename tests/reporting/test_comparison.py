"""Pages of things side by side: a comparison's arms, whatever finished, and several runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtune import api
from llmtune.arms.verdict import conclude
from llmtune.errors import RecipeError
from llmtune.files import write_json
from llmtune.reporting.comparison.page import render
from llmtune.reporting.comparison.runs import render_runs
from llmtune.run import Run
from tests.reporting.conftest import EVIL
from tests.support.comparisons import arm, baseline, comparison, scratch
from tests.support.pages import Page, empty, headings

TRIES = [
    {"lr": factor * 1e-3, "factor": factor, "steps": 9, "seconds": 1.0, "loss": 3.0 - factor, "state": "complete"}
    for factor in (0.3, 1.0, 3.0)
]
FAILED: Any = {"name": "qlora", "set": [], "size": 1.0, "status": "failed", "reason": f"no GPU {EVIL}"}
SECTIONS = ["Who wins, and why", "Arms", "What training a pretrained model gains", "Quality against cost"]
SECTIONS += ["Validation loss", "Quality by data size", "Search of the learning rate", "What trains when"]
LAST = "What was compared"


def titles(text: str) -> list[str]:
    """The titles of a page's sections, and none of its script."""
    return headings(text.rpartition("<script>")[0])


def drawn(text: str) -> int:
    """How many charts a page draws."""
    return text.count('<figure class="drawn">')


def test_page_shows_a_whole_comparison_and_escapes_reasons(finished: Run, tmp_path: Path) -> None:
    plan = json.loads(finished.plan_file.read_text())
    arms = [arm("lora", [0.6, 0.6], search=TRIES, plan=plan, method="LoRA"), arm("full", [0.3, 0.3], plan=plan), FAILED]
    arms += [arm("lora", [0.4, 0.4], size=0.1)]
    write_json(tmp_path / "compare.json", comparison(arms, [baseline("tf-idf", 0.8), scratch(0.1), scratch(0.1, 0.1)]))
    (tmp_path / "arms/lora/seed-1").mkdir(parents=True)
    (tmp_path / "arms/lora/seed-1/report.html").write_text("")
    text = api.report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert titles(text) == [*SECTIONS, LAST]
    assert drawn(text) == 6
    assert "lora wins: exact match 0.600 ± 0.035 on 200 held-out rows" in page.text
    assert "a linear model over TF-IDF (by 0.200" in page.text
    assert ["lora seed 1", "0.600 ± 0.035", "1.400 ± 0.035", "wins"] in page.rows
    assert f"failed: no GPU {EVIL}" in [row[-1] for row in page.rows]
    assert [one["href"] for one in page.all("a")] == ["arms/lora/seed-1/report.html"]
    assert not page.all("img")
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"compare\.json: version: field required"):
        api.report(tmp_path)
    assert len(page.all("table", **{"class": "strip"})) == 2


@pytest.mark.parametrize("arms", [[], [FAILED]])
def test_page_of_a_comparison_that_has_only_begun(arms: list[Any], tmp_path: Path) -> None:
    begun = comparison(arms)
    text = render(begun, conclude(begun), tmp_path)
    assert titles(text) == [*SECTIONS[:2], LAST]
    assert "No arm has a score, so none wins." in Page(text).text


def test_page_of_arms_without_curves_or_memory(tmp_path: Path) -> None:
    one = arm("lora", 0.5, peak=None, plan={"stages": "damaged"})
    one["seeds"][0]["curve"] = []
    compared = comparison([one])
    text = render(compared, conclude(compared), tmp_path)
    assert titles(text) == [*SECTIONS[:4], LAST]
    assert drawn(text) == 1


def test_runs_stand_side_by_side(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run twice differs nowhere; one that has done nothing is lines that say so."""
    other = Path(shutil.copytree(finished.path, tmp_path / "other"))
    monkeypatch.chdir(tmp_path)
    text = api.report(finished.path, other).read_text(encoding="utf-8")
    page = Page(text)
    assert (tmp_path / "runs-compared.html").is_file()
    assert titles(text) == ["Results", "Validation loss", "Settings that differ", "What trains when"]
    assert ["other", "exact match", "+0.000 ± 0.000", "no difference measured", "23"] in page.rows
    assert "None: the recipes are the same." in page.text
    assert drawn(text) == 3
    bare = render_runs([finished, empty(tmp_path, eval={"suite": "quick"})])
    shown = Page(bare)
    assert f"is not evaluated: llmtune eval {tmp_path / 'run'}" in shown.text
    assert "The runs have different bases" in shown.text
    assert "Without a validation: " in shown.text
    assert any(row and row[0] == "model.base" for row in shown.rows)


def test_refuses_a_file_for_the_page_of_one_run(finished: Run) -> None:
    with pytest.raises(RecipeError, match=r"-o x\.html: is for several runs"):
        api.report(finished.path, out="x.html")
    with pytest.raises(RecipeError, match="--set: is for the page of one run"):
        api.report(finished.path, finished.path, set=["merge.enabled=false"])
