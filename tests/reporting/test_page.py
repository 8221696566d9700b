"""The report page: one file that loads nothing, true to the run's own files, whatever the run has done so far."""

import base64
import hashlib
import re
from html import unescape
from pathlib import Path

from llmtune.evaluation.tables import table
from llmtune.files import read_json, write_json
from llmtune.numbers import size
from llmtune.plan.distances import Everything, Top
from llmtune.reporting.html import tag
from llmtune.reporting.page import report
from llmtune.run import Run
from tests.reporting.conftest import EVIL
from tests.support import ROOT
from tests.support.pages import Page, empty, falling, headings, page, stage, with_log

HEADINGS = ["Base and tuned", "Loss", "What trained when", "Learning rate by distance", "Throughput", "Held-out rows"]
HEADINGS += ["Data", "Merge", "Settings", "Files", "Next"]


def test_page_of_finished_run_has_every_section(finished: Run) -> None:
    found = page(finished)
    text = finished.report_file.read_text(encoding="utf-8")
    assert headings(text) == HEADINGS
    assert "yet." not in found.text
    assert "Training by LoRA (rank 4): all layers at one rate" in found.text
    when = finished.manifest()["steps"]["train"]["finished"]
    assert f"{when[:10]} {when[11:16]} UTC" in found.text
    assert finished.recipe_file.read_text().rstrip() in found.text
    assert f"llmtune chat {finished.path}" in found.text
    assert f"llmtune eval {finished.path}" not in found.text


def test_page_loads_nothing_and_runs_its_own_script_alone(finished: Run) -> None:
    found = page(finished)
    names = {name for name, _ in found.elements}
    attributes = {key for _, given in found.elements for key in given}
    assert not names & {"link", "img", "iframe", "object", "embed", "base", "a", "form", "image", "use"}
    assert not {key for key in attributes if key in ("src", "href", "xlink:href", "srcset") or key.startswith("on")}
    assert "url(" not in found.styles
    assert "@import" not in found.styles
    (policy,) = found.all("meta", **{"http-equiv": "Content-Security-Policy"})
    (script,) = re.findall(r"<script>(.*?)</script>", finished.report_file.read_text(encoding="utf-8"), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in policy["content"]
    kinds = [one.get("type") for one in found.all("script")]
    assert kinds.count(None) == 1
    assert set(kinds) == {None, "application/json"}
    own = script.removeprefix((ROOT / "llmtune/reporting/charts/vega/vega.min.js").read_text(encoding="utf-8"))
    assert len(own) < 10_000
    assert not re.search(r"fetch|XMLHttpRequest|innerHTML|eval|import", own)
    assert found.all("meta", name="viewport")


def test_escapes_text_of_rows(finished: Run) -> None:
    report(finished)
    text = finished.report_file.read_text(encoding="utf-8")
    charts = text.count('<figure class="drawn">')
    assert text.count("<script") == text.count("</script") == 1 + charts
    assert not Page(text).all("img")
    assert text.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;amp;") >= 20
    assert EVIL in Page(text).text


def test_escapes_names_of_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "<b>bold"
    folder.mkdir()
    found = page(empty(folder, model={"base": f"me/{EVIL}"}))
    assert len(found.all("script")) == 1
    assert EVIL in found.text
    assert not found.all("img")


def test_table_equals_stored_evaluation(finished: Run) -> None:
    shown = page(finished).rows
    for row in table(finished, with_intervals=True):
        assert list(row.values()) in shown
        assert "] " in row["exact match"] + " "
    stored = read_json(finished.eval / "tuned.json")
    gap = stored["differences"]["base, zero-shot"]["held_out"]["loss"]
    value = f"{'+' if gap['difference'] >= 0 else ''}{gap['difference']:.3f} ± {gap['stderr']:.3f}"
    bounds = "{:+.3f} to {:+.3f}".format(*gap["interval"])
    assert ["base, zero-shot", "loss (lower is better)", f"{value} [{bounds}]", gap["verdict"], "", "", ""] in shown


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
    total, prompts = findings["supervised_tokens"]["total"], findings["prompt_tokens"]
    assert f"{total:,} learned, {prompts:,} only read" in text
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
    assert "Training by DoRA (rank 8) under gradual unfreezing" in page(run).text
    told = page(with_log(run, stages, falling({"0": 1e-3}), blocks=30)).text
    assert "unfreezing: head and final norm, then the last 12 blocks, then all layersbase" in told
    falls = [stage(0, 40, Everything(), {"0": 1e-3, "1": 1e-4})]
    assert ": all layers at rates that fall towards the input" in page(with_log(run, falls, falling({"0": 1e-3}))).text
    assert ": the last block at one rate" in page(with_log(run, [stage(0, 40, Top(1), {"0": 1e-3})], [])).text


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
