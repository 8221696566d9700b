"""Every kind of page in a browser: it opens from a file, draws every chart, loads nothing and is accessible."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from llmtune.arms.verdict import conclude
from llmtune.reporting.comparison.page import render
from llmtune.reporting.comparison.runs import render_runs
from llmtune.reporting.page import report
from llmtune.reporting.studies.page import render as render_study
from llmtune.run import Run
from tests.reporting.test_comparison import TRIES
from tests.support.comparisons import arm, baseline, comparison, scratch, study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAMES = [("light", 390), ("dark", 390), ("light", 1280), ("dark", 1280)]
JUDGED = {"run.html": FRAMES, "compared.html": FRAMES[1:3], "sides.html": FRAMES[:1], "study.html": FRAMES[1:2]}
ARMS = [("lora", 0.6), ("full", 0.61), ("qlora", 0.62)]
WATCH = """
window.faults = [];
addEventListener("error", (event) => faults.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => faults.push(`${event.violatedDirective} ${event.blockedURI}`));
console.error = (...words) => faults.push(words.join(" "));
"""
JUDGE = """
addEventListener("load", () => setTimeout(async () => {
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const { violations } = await axe.run(document, { iframes: false });
  const figures = [...document.querySelectorAll("figure.drawn")];
  const zoomed = figures.filter((one) => one.querySelector(".zoom:not([hidden])")).map((one) => {
    const ticks = () => [...one.querySelector(".plot svg").textContent].sort().join("");
    const before = ticks();
    one.querySelector("[data-zoom=in]").click();
    return new Promise((go) => setTimeout(() => {
      const inside = ticks();
      one.querySelector(".plot").dispatchEvent(new KeyboardEvent("keydown", { key: "0", bubbles: true }));
      setTimeout(() => go([before !== inside, before === ticks()]), 300);
    }, 300));
  });
  parent.postMessage(JSON.stringify({ page: location.pathname.split("/").pop(),
    dark: matchMedia("(prefers-color-scheme: dark)").matches, width: innerWidth, faults, figures: figures.length,
    wide: document.documentElement.scrollWidth, zoomed: await Promise.all(zoomed),
    drawn: figures.filter((one) => one.querySelector(".plot svg path")).length,
    loaded: performance.getEntriesByType("resource").map((one) => one.name),
    axe: violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 200)).join(" | ")}`),
  }), "*");
}, 1000));
"""
OUTER = """<!doctype html><title>frames</title>%s<pre></pre><script>
addEventListener("message", (event) => { document.querySelector("pre").append(event.data + "\\n"); });
</script>"""


def watched(page: str) -> str:
    """A page that tells what it is like; its policy stays but for two scripts."""
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    scripts = [WATCH, axe.replace("</script", "<\\/script") + JUDGE]
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    page = page.replace("script-src ", f"script-src {' '.join(f'&#x27;sha256-{one}&#x27;' for one in hashes)} ", 1)
    page = page.replace("<title>", f"<script>{scripts[0]}</script><title>", 1)
    return page.replace("</body>", f"<script>{scripts[1]}</script></body>")


def judged(pages: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """What one browser says of pages in both schemes, on a phone and a desktop."""
    for name, page in pages.items():
        (folder / name).write_text(watched(page), encoding="utf-8")
    frames = (
        f'<iframe src="{name}" style="color-scheme: {scheme}; border: 0; width: {width}px; height: 900px"></iframe>'
        for name in pages
        for scheme, width in JUDGED[name]
    )
    (folder / "frames.html").write_text(OUTER % "".join(frames))
    command = [str(CHROMIUM), "--headless", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0)
    command += ["--window-size=1400,4000", "--virtual-time-budget=30000", "--dump-dom", f"file://{folder}/frames.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<pre>(.*?)</pre>", dom, re.DOTALL)
    assert found, dom[-2000:]
    lines = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_pages_open_offline_draw_their_charts_and_are_accessible(finished: Run, tmp_path: Path) -> None:
    plan = json.loads(finished.plan_file.read_text())
    arms = [arm(name, [right, right - 0.1], seconds=100 + right, plan=plan, search=TRIES) for name, right in ARMS]
    arms += [arm("lora", 0.4, size=0.1), {"name": "dora", "set": [], "size": 1.0, "status": "failed", "reason": "why"}]
    lora = arms[0]["seeds"][0]["run"]
    (tmp_path / lora).mkdir(parents=True)
    (tmp_path / lora / "report.html").write_text("")
    compared = comparison(arms, [baseline("tf-idf", 0.8), scratch(0.1), scratch(0.1, 0.1)])
    other = Run(Path(shutil.copytree(finished.path, tmp_path / "other")))
    of_arms = render(compared, conclude(compared), tmp_path)
    pages = {"run.html": report(finished).read_text(encoding="utf-8"), "compared.html": of_arms}
    pages |= {"sides.html": render_runs([finished, other]), "study.html": render_study(study())}
    told = judged(pages, tmp_path)
    assert len(told) == sum(map(len, JUDGED.values()))
    assert {(one["dark"], one["width"]) for one in told} == {(s == "dark", width) for s, width in FRAMES}
    for one in told:
        page = pages[one["page"]]
        assert one["axe"] == []
        assert one["faults"] == []
        assert one["loaded"] == []
        assert one["drawn"] == one["figures"] == page.count('<figure class="drawn">') > 1
        assert one["zoomed"] == [[True, True]] * page.count('class="zoom"')
        assert one["wide"] <= one["width"]
