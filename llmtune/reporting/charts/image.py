"""Drawings as files of their own: SVG that a page shows by <img>, with the report's colors and a background."""

from functools import cache
from pathlib import Path

from llmtune.reporting.html import Html, tag

_PICTURE = Path(__file__).with_name("picture.css")
_STYLE = _PICTURE.parent.parent / "style.css"
_FONT = 'svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }'


def image(width: int, height: int, label: str, *parts: Html) -> str:
    """Return a complete SVG file of these parts on the page's color; `label` says in words what it shows."""
    page = tag("rect", width=width, height=height, rx=6, style="fill:var(--page)")
    size = {"width": width, "height": height, "viewBox": f"0 0 {width} {height}"}
    style = tag("style", Html(_style()))
    title = tag("title", label)
    root = {"xmlns": "http://www.w3.org/2000/svg", **size, "class_": "chart", "role": "img"}
    return tag("svg", title, style, page, *parts, **root) + "\n"


@cache
def _style() -> str:
    """The report's colors, and the lines of drawings."""
    lines = _STYLE.read_text(encoding="utf-8").splitlines()
    colors = lines[: lines.index("* { box-sizing: border-box; }")]
    return "\n".join([*colors, _FONT, _PICTURE.read_text(encoding="utf-8").rstrip()])
