"""HTML that is escaped unless it is markup already, and numbers as a reader wants them."""

import html


class Html(str):
    """Text that is markup already; only `tag` and `join` make it."""

    __slots__ = ()


def tag(element: str, /, *children: object, **attributes: object) -> Html:
    """An element; children and attributes that are not Html are escaped, None children and attributes are left out.

    An attribute's trailing underscore falls away (`class_`) and other underscores become hyphens.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if element in ("meta", "col"):
        return Html(f"<{element}{given}>")
    return Html(f"<{element}{given}>{join(*children)}</{element}>")


def join(*children: object) -> Html:
    """Children one after the other, escaped unless they are Html."""
    parts = (child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None)
    return Html("".join(parts))


def section(title: str, *body: object, note: str | None = None) -> Html:
    """A titled part of the page, with an optional line under the title."""
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else None, *body)


def table(head: list[object], rows: list[list[object]], numeric: set[int] = frozenset(), **attributes: object) -> Html:  # type: ignore[assignment]
    """A table that scrolls sideways where the screen is narrow; columns in `numeric` are set right."""

    def cells(kind: str, row: list[object]) -> list[Html]:
        return [tag(kind, cell, class_="n" if index in numeric else None) for index, cell in enumerate(row)]

    body = [tag("tr", *cells("td", row)) for row in rows]
    inner = tag("table", tag("thead", tag("tr", *cells("th", head))), tag("tbody", *body), **attributes)
    return tag("div", inner, class_="scroll")


def facts(pairs: list[tuple[str, object]]) -> Html:
    """Names and values in two columns; a pair whose value is None is left out."""
    shown = [join(tag("dt", name), tag("dd", value)) for name, value in pairs if value is not None]
    return tag("dl", *shown)
