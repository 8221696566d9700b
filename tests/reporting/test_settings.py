"""The page's style and settings: readable names, no internals, contrast, and screens as narrow as a phone's."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from llmtune.plan.distances import Everything
from llmtune.reporting.settings import settings_section
from llmtune.run import Run
from tests.support.pages import Page, empty, falling, page, stage, with_log

STYLE = (Path(__file__).parents[2] / "llmtune" / "reporting" / "style.css").read_text()
METHOD = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "lora", "rank": 8, "ranks": {"q_proj": 4}}}


def test_settings_are_a_list_with_readable_names(tmp_path: Path) -> None:
    run = empty(tmp_path, method=METHOD)
    found = Page(settings_section(run.recipe(), run.recipe_file.read_text()))
    names = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", settings_section(run.recipe(), ""))
    pairs = dict(names)
    assert pairs["learning rate"] == "1e-3"
    assert pairs["batch size"] == "4"
    assert pairs["ranks"] == "q_proj 4"
    assert pairs["activation checkpointing"] == "auto"
    assert not [name for name in pairs if "_" in name]
    assert not [value for _, value in names if value in ("None", "True", "False") or value.startswith(("{", "[", "("))]
    assert run.recipe_file.read_text().rstrip() in found.text
    titles = re.findall(r"<h3>(.*?)</h3>", settings_section(run.recipe(), ""))
    assert titles[:4] == ["Model", "Data", "Method", "Adapter"]


def test_stages_of_a_method_are_listed(tmp_path: Path) -> None:
    stages = [{"until": 0.5, "reach": 1, "lr": 1e-3}, {"until": 1.0, "reach": 3, "lr": 5e-4}]
    run = empty(tmp_path, method={"kind": "staged", "stages": stages})
    text = settings_section(run.recipe(), "")
    assert "until 0.5, " in text
    assert "learning rate 1e-3; until 1, " in text


def test_page_has_no_raw_internals(finished: Run) -> None:
    visible = re.sub(r"<(pre|figure|article)[ >].*?</\1>", "", render_of(finished), flags=re.DOTALL)
    text = Page(visible).text
    assert not re.search(r"\b(None|True|False|null)\b", text)
    assert not re.search(r"[{}]|\bPosixPath|\[\]", text)
    known = "lm_eval|max_length|eval_fraction|prompt_completion"
    assert not re.findall(rf"\b(?!{known})[a-z]+_[a-z_]+\b(?!\.\w)", strip_paths(text))


def render_of(run: Run) -> str:
    """The markup of a run's page."""
    page(run)
    return run.report_file.read_text()


def strip_paths(text: str) -> str:
    """Text without paths of files."""
    return re.sub(r"[\w./-]*/[\w./-]*", "", text)


def test_headings_go_down_one_level_at_a_time(finished: Run) -> None:
    levels = [int(name[1]) for name, _ in page(finished).elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_table_stacks_or_scrolls_in_its_own_box(finished: Run) -> None:
    found = page(finished)
    assert len(found.all("table")) == len(found.all("div", **{"class": "scroll"}))
    for attributes in found.all("table"):
        assert attributes["class"].split()[0] in ("stacks", "strip")
    labelled = [cell for cell in found.all("td") if "data-label" in cell]
    assert {cell["data-label"] for cell in labelled} >= {"model", "exact match", "SHA-256"}
    phone = STYLE[STYLE.index("@media (max-width: 620px)") :]
    assert ".stacks thead { display: none; }" in phone
    assert re.search(r"\.scroll \{ overflow-x: auto", STYLE)
    assert re.search(r"\.plot \{ width: 100%", STYLE)


def colors(dark: bool) -> dict[str, str]:
    """The style's color variables in one scheme."""
    light, night = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", night if dark else light))


def luminance(color: str) -> float:
    """The relative luminance of a color, as WCAG defines it."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "quiet", "tuned", "good", "bad", "valid"])
def test_text_has_contrast(name: str, dark: bool) -> None:
    scheme = colors(dark)
    for ground in ("page", "card"):
        bright, dim = sorted((luminance(scheme[name]), luminance(scheme[ground])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5


def test_style_follows_the_scheme_of_the_system_and_prints() -> None:
    assert "prefers-color-scheme: dark" in STYLE
    assert "@media print" in STYLE


def test_charts_come_before_examples(tmp_path: Path, finished: Run) -> None:
    text = render_of(finished)
    assert text.rindex('<figure class="drawn') < text.index("<article")
    run = with_log(empty(tmp_path), [stage(0, 40, Everything(), {"0": 1e-3})], falling({"0": 1e-3}))
    assert 700_000 < len(render_of(run)) < 800_000
