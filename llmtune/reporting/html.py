"""HTML in which all text is escaped, unless it is markup already."""

import html
from collections.abc import Collection


class Html(str):
    """Text that is markup already; only `tag` and `join` make it."""

    __slots__ = ()


def tag(element: str, /, *children: object, **attributes: object) -> Html:
    """Make an element; text in children and attributes is escaped, None is left out.

    An attribute loses its trailing underscore (`class_`); other underscores become hyphens.
    """
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if element in ("meta", "col", "input"):
        return Html(f"<{element}{text}>")
    return Html(f"<{element}{text}>{join(*children)}</{element}>")


def join(*children: object) -> Html:
    """Join children, escaping what is not Html; None is left out."""
    parts = (child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None)
    return Html("".join(parts))


def section(title: str, *body: object, note: str | None = None) -> Html:
    """Make a section of the page, with an optional line under its title."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else None, *body)


def table(
    head: list[object],
    rows: list[list[object]],
    numeric: Collection[int] = (),
    words: Collection[int] = (),
    **attributes: object,
) -> Html:
    """Make a table whose rows stack on a narrow screen, each cell under its title.

    `numeric` columns align right; columns of `words` break their lines, others are as wide as their longest cell.
    """
    kinds = ["n" * (index in numeric) or "words" * (index in words) for index in range(len(head))]
    body = [tag("tr", *map(_cell, row, head, kinds)) for row in rows]
    titles = (tag("th", title, class_="n" if index in numeric else None) for index, title in enumerate(head))
    inner = tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *body), class_="stacks", **attributes)
    return tag("div", inner, class_="scroll")


def _cell(value: object, title: object, kind: str) -> Html:
    kind = f"{kind}{' empty' * (value in (None, ''))}".strip()
    return tag("td", value, class_=kind or None, data_label=title or None)


def scrolling(wide: Html, label: str) -> Html:
    """Put what may be wider than a screen into a box of its own that scrolls, by keyboard too."""
    return tag("div", wide, class_="scroll", role="region", aria_label=label, tabindex=0)


def fold(summary: object, *body: object) -> Html:
    """Hide content under a line that opens it."""
    return tag("details", tag("summary", summary), *body)


def facts(pairs: list[tuple[str, object]]) -> Html | None:
    """List names and values in two columns; a pair whose value is None is left out."""
    shown = [join(tag("dt", name), tag("dd", value)) for name, value in pairs if value is not None]
    return tag("dl", *shown) if shown else None


def free(text: str, kind: str = "text") -> Html:
    """Show a user's own text as it is, in the direction of its script."""
    return tag("div", text, class_=kind, dir="auto")
