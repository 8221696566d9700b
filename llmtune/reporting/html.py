"""HTML in which all text is escaped, unless it is markup already."""

import html


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
    if element in ("meta", "col"):
        return Html(f"<{element}{text}>")
    return Html(f"<{element}{text}>{join(*children)}</{element}>")


def join(*children: object) -> Html:
    """Join children, escaping what is not Html; None is left out."""
    parts = (child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None)
    return Html("".join(parts))


def section(title: str, *body: object, note: str | None = None) -> Html:
    """Make a section of the page, with an optional line under its title."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else None, *body)


def table(head: list[object], rows: list[list[object]], numeric: set[int] = frozenset(), **attributes: object) -> Html:  # type: ignore[assignment]
    """Make a table that scrolls sideways on a narrow screen; columns in `numeric` are aligned right."""

    def cells(kind: str, row: list[object]) -> list[Html]:
        return [tag(kind, cell, class_="n" if index in numeric else None) for index, cell in enumerate(row)]

    body = [tag("tr", *cells("td", row)) for row in rows]
    inner = tag("table", tag("thead", tag("tr", *cells("th", head))), tag("tbody", *body), **attributes)
    return tag("div", inner, class_="scroll")


def facts(pairs: list[tuple[str, object]]) -> Html:
    """List names and values in two columns; a pair whose value is None is left out."""
    shown = [join(tag("dt", name), tag("dd", value)) for name, value in pairs if value is not None]
    return tag("dl", *shown)
