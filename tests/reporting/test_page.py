"""The report page: one file that loads nothing, true to the run's own files, whatever the run has done so far."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmtune import recipe
from llmtune.evaluation.results import table
from llmtune.evaluation.step import evaluate
from llmtune.files import read_json, write_json
from llmtune.merging.step import merge
from llmtune.numbers import size
from llmtune.plan.distances import Distances, Everything, Top
from llmtune.plan.table import BaseName, CacheSize, PlanTable, StageRow
from llmtune.reporting.charts import decades, thin, ticks
from llmtune.reporting.html import tag
from llmtune.reporting.page import report
from llmtune.run import Run, create
from tests.support import runs, tiny

EVIL = '<script>alert("x")</script>&amp;<img src=x onerror=alert(1)>'
VOID = {"meta", "col"}
HEADINGS = ["Base and tuned", "10 held-out rows", "Loss", "Learning rate by distance", "What trained when"]
HEADINGS += ["Data", "Merge", "Files", "Recipe", "Next"]


class Page(HTMLParser):
    """A parsed page: its elements with attributes, its table rows and its visible text; badly nested tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.styles, self.text = "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, {key: value or "" for key, value in attributes}))
        if name not in VOID:
            self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
        elif "title" not in self.open:
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data

    def all(self, name: str, /, **attributes: str) -> list[dict[str, str]]:
        """The attributes of the elements of a name that have the given ones."""
        found = (given for element, given in self.elements if element == name)
        return [given for given in found if attributes.items() <= given.items()]


def page(run: Run) -> Page:
    return Page(report(run).read_text(encoding="utf-8"))


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def empty(folder: Path, **sections: Any) -> Run:
    """A run that holds its recipe alone."""
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(3))
    return create(recipe.load(tiny.write_recipe(folder / "r.json", Path("me/base"), rows, **sections)), folder / "run")


def with_log(run: Run, stages: list[StageRow], records: list[dict[str, Any]], blocks: int = 2) -> Run:
    """The run with a plan of these stages and a log."""
    table = PlanTable(
        base=BaseName("me/base", None, None),
        method="full",
        adapter="none",
        blocks=blocks,
        parameters=1000,
        trained=100,
        adapted={},
        quantized=0,
        delta_bytes=400,
        states_bytes=16_000,
        frozen_blocks=CacheSize([], 0, 0),
        steps=stages[-1].end,
        stages=stages,
        notes=[],
    )
    write_json(run.plan_file, table.to_json())
    run.log_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def stage(start: int, end: int, trains: Distances, rates: dict[str, float]) -> StageRow:
    """A stage with one tensor of 50 parameters at each distance."""
    by_distance = {int(distance): value for distance, value in rates.items()}
    ones, fifties = dict.fromkeys(by_distance, 1), dict.fromkeys(by_distance, 50)
    return StageRow(start, end, 1.0, trains, max(rates.values()), 1.0, by_distance, ones, fifties)


def falling(rates: dict[str, float], steps: int = 40) -> list[dict[str, Any]]:
    """A log whose loss falls from 4 to 1, with a validation at every tenth step."""
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        facts = {"tokens": 100 * step, "seconds": 2.0 * step, "tokens_per_s": 50.0, "peak_memory_mb": 1000.0 + step}
        log.append({"step": step, "loss": 4 - 3 * (step - 1) / (steps - 1), "lr": rates, **facts})
        log += [{"step": step, "eval_loss": 5 - step / 10}] if step % 10 == 0 else []
    return log


@pytest.fixture(scope="module")
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


def test_page_of_finished_run_has_every_section(finished: Run) -> None:
    found = page(finished)
    text = finished.report_file.read_text(encoding="utf-8")
    assert headings(text) == HEADINGS
    assert "yet." not in found.text
    assert "full, lora (rank 4, alpha 8): all layers at one rate" in found.text
    when = finished.manifest()["steps"]["train"]["finished"]
    assert f"{when[:10]} {when[11:16]} UTC" in found.text
    assert finished.recipe_file.read_text().rstrip() in found.text
    assert f"llmtune chat {finished.path}" in found.text
    assert f"llmtune eval {finished.path}" not in found.text


def test_page_loads_and_runs_nothing(finished: Run) -> None:
    found = page(finished)
    names = {name for name, _ in found.elements}
    attributes = {key for _, given in found.elements for key in given}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "a", "form", "image", "use"}
    assert not {key for key in attributes if key in ("src", "href", "xlink:href", "srcset") or key.startswith("on")}
    assert "url(" not in found.styles
    assert "@import" not in found.styles
    assert "prefers-color-scheme: dark" in found.styles
    (policy,) = found.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    assert found.all("meta", name="viewport")


def test_escapes_text_of_rows(finished: Run) -> None:
    report(finished)
    text = finished.report_file.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;amp;") >= 20
    assert EVIL in Page(text).text


def test_escapes_names_of_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "<b>bold"
    folder.mkdir()
    found = page(empty(folder, model={"base": f"me/{EVIL}"}))
    assert not found.all("script")
    assert EVIL in found.text


def test_table_equals_stored_evaluation(finished: Run) -> None:
    shown = page(finished).rows
    for row in table(finished):
        assert list(row.values()) in shown
    stored = read_json(finished.eval / "tuned.json")
    gap = stored["differences"]["base, zero-shot"]["held_out"]["loss"]
    value = f"{'+' if gap['difference'] >= 0 else ''}{gap['difference']:.3f} ± {gap['stderr']:.3f}"
    assert ["base, zero-shot", "loss", value, "", "", ""] in shown


def test_shows_ten_rows_with_answers_and_verdicts(finished: Run) -> None:
    for name in ("base", "tuned"):
        stored = read_json(finished.eval / f"{name}.json")
        for key in {"rows", "few_shot_rows"} & set(stored):
            for place, row in enumerate(stored[key]):
                row |= {"output": f"{name} {key} {row['id']}", "exact_match": place % 3 == 0}
        write_json(finished.eval / f"{name}.json", stored)
    files = [finished.eval / f"{name}.json" for name in ("base", "tuned", "settings")]
    finished.mark("eval", files)
    found = page(finished)
    chosen = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    for place in range(23):
        for output in (
            f"base rows sum-{50 + place}",
            f"tuned rows sum-{50 + place}",
            f"few_shot_rows sum-{50 + place}",
        ):
            assert (output in found.text) == (place in chosen)
    right = sum(place % 3 == 0 for place in chosen)
    assert found.text.count("✓ right") == 3 * right
    assert found.text.count("✗ wrong") == 3 * (10 - right)


def test_lists_every_file_with_its_hash(finished: Run) -> None:
    rows = page(finished).rows
    steps = finished.manifest()["steps"]
    listed = {
        name: (step, facts) for step, done in steps.items() if step != "report" for name, facts in done["files"].items()
    }
    assert {"delta/adapter_model.safetensors", "eval/tuned.json", "merged/model.safetensors"} <= set(listed)
    for name, (step, facts) in listed.items():
        assert [name, step, size(facts["bytes"]), facts["sha256"]] in rows


def test_shows_merge_proof_and_data_findings(finished: Run) -> None:
    text = page(finished).text
    done = finished.manifest()["steps"]["merge"]
    assert f"largest logit gap{done['gap']:.4g} (allowed: {done['bound']:.4g})" in text
    findings = read_json(finished.data_file)
    assert f"{findings['supervised_tokens']['total']:,}, {findings['supervised_tokens']['mean']} a row" in text
    assert all(note in text for note in findings["notes"])
    learned = [
        unescape(part) for part in re.findall(r"<mark>(.*?)</mark>", finished.report_file.read_text(), re.DOTALL)
    ]
    assert [re.search(r"⟦(.*)⟧", findings["example"], re.DOTALL)[1]] == learned  # type: ignore[index]


def test_marks_report_done(finished: Run) -> None:
    report(finished)
    assert finished.done("report")
    assert not list(finished.path.glob(".report*"))
    finished.report_file.write_text("cut")
    assert not finished.done("report")


def test_page_of_trained_run_says_what_is_missing(tmp_path: Path) -> None:
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), {"0": 1e-3})], falling({"0": 1e-3}))
    run.mark("train", [run.log_file])
    found = page(run)
    for line in ("eval.suite is none: this run is not evaluated.", "Not merged yet.", "The data is not checked yet."):
        assert line in found.text
    assert "held-out rows" not in headings(run.report_file.read_text())
    for command in ("eval", "merge", "chat"):
        assert f"llmtune {command} {run.path}" in found.text
    for number in (
        "1.000validation loss, first 4.000",
        "1:20training, 50 tokens/s",
        "1.1 GBpeak memory",
        "10.0% of the model",
    ):
        assert number in found.text


def test_writes_page_of_run_that_has_done_nothing(tmp_path: Path) -> None:
    found = page(empty(tmp_path, eval={"suite": "quick"}))
    assert found.text.count("yet.") == 7
    assert "not trained yet" in found.text
    assert f"llmtune run {tmp_path / 'run'}" in found.text
    assert not found.all("svg")


def paths(run: Run, chart: str) -> list[list[tuple[float, float]]]:
    """The lines of the wide drawing of a chart, each as its points in pixels."""
    body = report(run).read_text(encoding="utf-8").split(f"<h2>{chart}</h2>")[1].split("<svg")[1]
    lines = re.findall(r'<path d="([^"]*)"', body)
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", line)] for line in lines]


def test_loss_chart_is_to_scale(tmp_path: Path) -> None:
    stages = [
        stage(0, 20, Top(0), {"0": 1e-3}),
        stage(20, 40, Everything(), {"0": 1e-3, "1": 1e-3, "2": 1e-3, "3": 1e-3}),
    ]
    run = with_log(empty(tmp_path), stages, falling({"0": 1e-3}))
    raw, mean, checks = paths(run, "Loss")
    assert len(raw) == len(mean) == 40
    assert [x for x, _ in checks] == [raw[step - 1][0] for step in (10, 20, 30, 40)]
    assert raw[0][1] < raw[-1][1]  # pixels count downwards: the first loss, 4, stands above the last
    bottom, per_loss = raw[-1][1], (raw[-1][1] - raw[0][1]) / 3
    assert checks[1][1] == pytest.approx(bottom - 2 * per_loss, abs=0.2)  # loss 3 stands two above the last, 1
    assert mean[20] == pytest.approx(raw[20], abs=0.2)  # the mean of a straight line is the line: it does not lag
    found = page(run)
    assert len(found.all("circle")) == 2 * 4
    (first, second) = found.all("line", **{"class": "mark"})[:2]
    assert first["x1"] == f"{raw[19][0]:.1f}"
    assert second["x1"] != first["x1"]


def test_rate_chart_joins_distances_with_equal_rates(tmp_path: Path) -> None:
    rates = {str(distance): 1e-3 if distance < 31 else 1e-5 for distance in range(32)}
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), rates)], falling(rates), blocks=30)
    far, near = paths(run, "Learning rate by distance")
    text = page(run).text
    assert "distance 0 to 30" in text
    assert "distance 31" in text
    assert "logarithmic" in text
    assert near[0][1] < far[0][1]


def test_rate_chart_of_many_rates_has_color_ramp(tmp_path: Path) -> None:
    rates = {str(distance): 1e-3 * 0.95**distance for distance in range(32)}
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), rates)], falling(rates), blocks=30)
    assert len(paths(run, "Learning rate by distance")) == 32
    text = page(run).text
    assert "32 lines, distance 0 (peak 1e-3)  31 (peak 2e-4)" in text
    assert "logarithmic" not in text
    assert "1 the last block, 30 the first, 31 the embeddings" in text


def test_strip_shows_which_layers_trained_in_which_stage(tmp_path: Path) -> None:
    stages = [
        stage(0, 10, Top(0), {"0": 1e-3}),
        stage(10, 20, Top(1), {"0": 5e-4, "1": 2.5e-4}),
        stage(20, 40, Everything(), {"0": 1e-4, "1": 1e-4, "2": 1e-4, "3": 1e-4}),
    ]
    found = page(with_log(empty(tmp_path), stages, falling({"0": 1e-3})))
    assert ["0 head and final norm", "1e-3", "5e-4", "1e-4"] in found.rows
    assert ["1 block 2", "frozen", "2.5e-4", "1e-4"] in found.rows
    assert ["2 to 3 block 1, embeddings", "frozen", "frozen", "1e-4"] in found.rows
    assert [column["style"] for column in found.all("col") if "style" in column] == [
        "width:18.0%",
        "width:18.0%",
        "width:36.0%",
    ]
    assert ["2", "11-20", "the last block", "5e-4", "2.5e-4", "2", "100", "10.00%"] in found.rows
    assert ["3", "21-40", "all layers", "1e-4", "1e-4", "4", "200", "20.00%"] in found.rows


def test_shows_layers_without_trained_tensor_as_frozen(tmp_path: Path) -> None:
    found = page(with_log(empty(tmp_path), [stage(0, 40, Everything(), {"1": 1e-3, "2": 1e-3})], falling({"1": 1e-3})))
    assert ["0 head and final norm", "frozen"] in found.rows
    assert ["1 to 2 blocks 1 to 2", "1e-3"] in found.rows
    assert ["3 embeddings", "frozen"] in found.rows


def test_shows_notes_of_the_log(tmp_path: Path) -> None:
    log = [*falling({"0": 1e-3}), {"step": 40, "frozen_blocks": "28 of 30 blocks were computed once"}]
    assert (
        "28 of 30 blocks were computed once"
        in page(with_log(empty(tmp_path), [stage(0, 40, Top(0), {"0": 1e-3})], log)).text
    )


def test_describes_method_in_words(tmp_path: Path) -> None:
    stages = [
        stage(0, 10, Top(0), {"0": 1e-3}),
        stage(10, 20, Top(12), {"0": 1e-3, "1": 1e-3}),
        stage(20, 40, Everything(), {"0": 1e-3}),
    ]
    run = empty(
        tmp_path, method={"kind": "gradual", "adapter": {"kind": "lora", "dora": True, "rank": 8, "dropout": 0.1}}
    )
    assert "gradual, lora (rank 8, alpha 32, dropout 0.1, dora)" in page(run).text
    told = page(with_log(run, stages, falling({"0": 1e-3}), blocks=30)).text
    assert "dora): head and final norm, then the last 12 blocks, then all layersbase" in told
    falls = [stage(0, 40, Everything(), {"0": 1e-3, "1": 1e-4})]
    assert ": all layers at rates that fall towards the input" in page(with_log(run, falls, falling({"0": 1e-3}))).text
    assert ": the last block at one rate" in page(with_log(run, [stage(0, 40, Top(1), {"0": 1e-3})], [])).text


def test_axes_have_round_ticks() -> None:
    assert ticks(0, 3.2, 5) == [0, 1, 2, 3]
    assert ticks(0.9, 1.1, 5) == [0.9, 0.95, 1.0, 1.05, 1.1]
    assert ticks(0, 225, 8) == [0, 50, 100, 150, 200]
    assert decades(1e-5, 1e-3) == pytest.approx([1e-3, 1e-4, 1e-5])
    assert len(decades(1e-18, 1e-3)) <= 7
    long = [(float(step), 1.0) for step in range(5000)]
    assert (len(thin(long)), thin(long)[0], thin(long)[-1]) == (200, long[0], long[-1])


def test_escapes_text_but_not_markup() -> None:
    assert tag("b", "<i>", tag("i", "&"), title='"<') == '<b title="&quot;&lt;">&lt;i&gt;<i>&amp;</i></b>'
    assert tag("p", None, 3, class_=None, http_equiv="x") == '<p http-equiv="x">3</p>'


def test_warns_of_truncated_requests_and_limited_rows(finished: Run) -> None:
    files = [finished.eval / f"{name}.json" for name in ("base", "tuned", "settings")]
    stored = {file: file.read_text() for file in files}
    try:
        base, tuned = (read_json(file) for file in files[:2])
        base["results"]["held_out_few_shot"]["truncated"] = 3
        tuned["results"]["held_out"]["of"] = 99
        write_json(files[0], base)
        write_json(files[1], tuned)
        finished.mark("eval", files)
        text = page(finished).text
        assert "base, 1-shot: 3 requests were longer than the model's context and lost their start." in text
        assert "Not all rows were used: n says how many." in text
    finally:
        for file, content in stored.items():
            file.write_text(content)
        finished.mark("eval", files)
    assert "longer than the model's context" not in page(finished).text
