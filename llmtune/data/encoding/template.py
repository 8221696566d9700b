"""Renders a conversation with the chat template, and finds an answer that is its last turn in the rendered text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llmtune.data.row import Message, Row, Tool
from llmtune.errors import RecipeError
from llmtune.files import digest_of
from llmtune.model.reading import TooMuch, bounded, one_line
from llmtune.model.tokens import RENDER_BYTES, RENDER_SECONDS

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Turn:
    """An assistant turn in the rendered conversation."""

    prompt: str
    """The text before the answer, from which generation starts."""
    end: str
    """The text up to the end of the turn's stop token; it starts with `prompt`."""
    adds: str = ""
    """What the template itself puts before the answer, such as an empty think block."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    generation_prompt: bool = False,
    tools: Sequence[Tool] = (),
    template: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation as text; raises RecipeError that names `where` if the template rejects it.

    `template` holds values for the chat template.
    """
    try:
        with bounded(RENDER_SECONDS, RENDER_BYTES):
            conversation = list(messages)
            text = tokenizer.apply_chat_template(
                conversation,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **(template or {}),
            )
    except TemplateError as error:
        raise RecipeError(f"{where}: the chat template rejects this conversation: {one_line(error)}") from error
    except (Exception, TooMuch) as error:
        # A template runs code of its own, such as `content.split('x')[1]`, and that may raise anything.
        raise RecipeError(f"{where}: the chat template fails on this conversation: {one_line(error)}") from error
    return str(text)


def last_turn(row: Row, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> Turn:
    """Find a row's last turn; raises RecipeError that says why the model could not learn it."""
    prompt = render(tokenizer, row.messages[:-1], row.where, True)
    rendered = render(tokenizer, row.messages, row.where)
    turn = _find(prompt, rendered, row.answer, stops)
    if turn is None:
        raise RecipeError(f"{row.where}: {_reason(prompt, rendered, row.answer.strip(), tokenizer, stops)}")
    return turn


def turn_at(row: Row, index: int, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> Turn | None:
    """Find the turn of message `index` in the text of the conversation that ends with it; None if it is not there."""
    prompt = render(tokenizer, row.messages[:index], row.where, True)
    rendered = render(tokenizer, row.messages[: index + 1], row.where)
    return _find(prompt, rendered, row.messages[index]["content"], stops)


def stop_end(text: str, start: int, stops: list[str]) -> int | None:
    """Return where the stop token ends that follows `start`; only white space may stand between them."""
    space = _SPACE.match(text, start)
    assert space is not None
    ends = [at + len(stop) for stop in stops for at in (start, space.end()) if text.startswith(stop, at)]
    return max(ends) if ends else None


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of the chat template, None without one; named templates are hashed together."""
    return digest_of(tokenizer.chat_template) if tokenizer.chat_template else None


def _find(prompt: str, rendered: str, answer: str, stops: list[str]) -> Turn | None:
    """Find the turn at the end of a text: prompt, answer (some templates strip it), stop token; else None."""
    if not rendered.startswith(prompt):
        return None
    for text in (answer, answer.strip()):
        at = rendered.find(text, len(prompt))
        while at >= 0:
            end = stop_end(rendered, at + len(text), stops)
            if end is not None:
                return Turn(prompt, rendered[:end], rendered[len(prompt) : at].strip())
            at = rendered.find(text, at + 1)
    return None


def _reason(prompt: str, rendered: str, answer: str, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> str:
    """Say why the model could not learn the last turn."""
    if not rendered.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), len(rendered))
        before, after = prompt[at : at + 30], rendered[at : at + 30]
        return f"the chat template changes the text before an answer: {before!r} becomes {after!r} once it is given"
    at = rendered.find(answer, len(prompt))
    if at < 0:
        return f"the chat template changes the answer: the rendered text does not contain {answer[:30]!r}"
    rest = rendered[at + len(answer) :][:200].strip()
    first = tokenizer.decode(tokenizer(rest, add_special_tokens=False)["input_ids"][:1]) if rest else ""
    ends = f"ends an answer with {first!r}" if first else "puts nothing after an answer"
    stop = " or ".join(repr(stop) for stop in stops)
    return f"the chat template {ends}, but the model stops at {stop}: the tuned model would not stop"
