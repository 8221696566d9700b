"""The page in a browser: it opens from a file, draws every chart, loads nothing and is accessible."""

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

from llmtune.reporting.page import report
from llmtune.run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAMES = [(scheme, width) for scheme in ("light", "dark") for width in (390, 1280)]
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
  parent.postMessage(JSON.stringify({
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


def judged(page: str, folder: Path) -> list[dict[str, Any]]:
    """What a browser says of a page in both schemes, on a phone and a desktop; its policy stays but for two scripts."""
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    scripts = [WATCH, axe.replace("</script", "<\\/script") + JUDGE]
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    page = page.replace("script-src ", f"script-src {' '.join(f'&#x27;sha256-{one}&#x27;' for one in hashes)} ", 1)
    page = page.replace("<title>", f"<script>{scripts[0]}</script><title>", 1)
    page = page.replace("</body>", f"<script>{scripts[1]}</script></body>")
    (folder / "page.html").write_text(page, encoding="utf-8")
    frames = (
        f'<iframe src="page.html" style="color-scheme: {scheme}; border: 0; width: {width}px; height: 900px"></iframe>'
        for scheme, width in FRAMES
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
def test_page_opens_offline_draws_its_charts_and_is_accessible(finished: Run, tmp_path: Path) -> None:
    page = report(finished).read_text(encoding="utf-8")
    frames = judged(page, tmp_path)
    assert {(one["dark"], one["width"]) for one in frames} == {(s == "dark", width) for s, width in FRAMES}
    for one in frames:
        assert one["faults"] == []
        assert one["loaded"] == []
        assert one["drawn"] == one["figures"] == page.count('<figure class="drawn">') > 3
        assert one["zoomed"] == [[True, True]] * 3
        assert one["wide"] <= one["width"]
        assert one["axe"] == []
