"""One page as a file: style, charts and script inside it, under a policy by which it loads nothing."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

from llmtune.reporting.html import Html, tag

_FOLDER = Path(__file__).parent
_SELF = escape("'self'")
_SCRIPTS = ("charts/vega/vega.min.js", "charts/charts.js", "filter.js")


def document(title: str, body: Sequence[Html | None]) -> str:
    """Return a page that opens offline, with what draws its charts where it has some."""
    main = tag("main", *body)
    script = _script(charts='<figure class="drawn">' in main)
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy(script)),
        tag("title", title),
        tag("style", Html(style)),
    )
    page = f"<!doctype html>\n{tag('html', head, tag('body', main, tag('script', Html(script))), lang='en')}\n"
    # JSON may hold halves of surrogate pairs, which no UTF-8 file can.
    return page.encode("utf-8", "replace").decode("utf-8")


@cache
def _script(charts: bool) -> str:
    """Return the one script of a page; without charts it is small."""
    return "".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS[0 if charts else 2 :])


def policy(script: str) -> str:
    """Return the policy under which a page loads nothing and runs this script alone, whatever a data row holds."""
    sources = f"default-src 'none'; style-src 'unsafe-inline'; script-src {_source(script)}"
    return f"{sources}; base-uri 'none'; form-action 'none'"


def with_script(page: str, script: str) -> str:
    """Return a page that runs another script too, which may ask the server that the page came from."""
    page = page.replace("script-src ", f"connect-src {_SELF}; script-src {escape(_source(script))} ", 1)
    start, end, rest = page.rpartition("</body>")
    return f"{start}{tag('script', Html(script))}{end}{rest}"


def _source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
