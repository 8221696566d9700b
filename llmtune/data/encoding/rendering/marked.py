"""Finds contents in a rendered conversation by rendering it once more with marks in their place.

What stands between marks is the template's own text, by which the contents are found in the real text.
"""

import itertools
from dataclasses import replace

from llmtune.data.encoding.rendering.fields import written_forms
from llmtune.data.encoding.template import Renderer, Request
from llmtune.data.row import Message, Row
from llmtune.errors import RecipeError


def template_pieces(row: Row, indices: list[int], text: str, renderer: Renderer) -> dict[int, str] | None:
    """Return the template's own text before the content of each of these messages; None where it reorders them."""
    pieces = _pieces(row, indices, text, renderer)
    return pieces and pieces[0]


def place_contents(text: str, pieces: dict[int, str], contents: dict[int, str]) -> dict[int, tuple[int, int]] | None:
    """Return where contents stand in a text between the template's pieces, without those that the template changed.

    The last content is not looked for. Returns None where the text is not made of these pieces.
    """
    indices = list(contents)
    places: dict[int, tuple[int, int]] = {}
    at = 0
    for index, following in itertools.pairwise(indices):
        if not text.startswith(pieces[index], at):
            return None
        at += len(pieces[index])
        content, piece, other = contents[index], pieces[following], contents[following]
        same = next((form for form in (content, content.strip()) if text.startswith(form + piece, at)), None)
        ends = [text.find(piece + form, at) for form in (other, other.strip())] if same is None else [at + len(same)]
        end = min((end for end in ends if end >= 0), default=None)
        if end is None:
            return None
        if text[at:end].strip() == content.strip():
            places[index] = (at, at + len(text[at:end].rstrip()))
        at = end
    return places


def tool_results(row: Row, prompt: str, renderer: Renderer) -> list[tuple[int, int]]:
    """Return where the results of tools stand in the prompt of a row's last answer.

    Raises RecipeError where that cannot be told.
    """
    indices = [index for index, message in enumerate(row.messages) if message["role"] == "tool"]
    if not indices:
        return []
    places = []
    pieces = _pieces(replace(row, messages=row.messages[:-1]), indices, prompt, renderer, generation_prompt=True)
    if pieces is not None:
        befores, rest = [*pieces[0].values()], pieces[1]
        at = 0
        for index, before, after in zip(indices, befores, [*befores[1:], ""], strict=True):
            if not prompt.startswith(before, at):
                break
            at += len(before)
            forms = written_forms(row.messages[index]["content"])
            size = next((len(form) for form in forms if prompt.startswith(form + after, at)), None)
            if size is None:
                break
            places.append((at, at + size))
            at += size
        if len(places) == len(indices) and rest == prompt[at:]:
            return places
    raise RecipeError(
        f"{row.where}: the chat template changes a tool's result, so that it cannot be told from what is learned; "
        "use data.learn: answers"
    )


def _pieces(
    row: Row, indices: list[int], text: str, renderer: Renderer, generation_prompt: bool = False
) -> tuple[dict[int, str], str] | None:
    """Return the template's text before each of these contents, and the text behind the last."""
    unique = next(mark for size in range(1, len(text)) if (mark := f"Mark{'q' * size}") not in text)
    marks = {index: f"{unique}{index}{unique}" for index in indices}
    marked: list[Message] = [
        {**message, "content": marks.get(i, message["content"])} for i, message in enumerate(row.messages)
    ]
    try:
        rest = renderer.render(Request(marked, row.tools, generation_prompt), row.where)
    except RecipeError:
        return None
    pieces = {}
    for index, mark in marks.items():
        pieces[index], separator, rest = rest.partition(mark)
        if not separator or unique in pieces[index]:
            return None
    return None if unique in rest else (pieces, rest)
