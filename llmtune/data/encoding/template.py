"""Renders conversations with the chat template and the values that a recipe gives it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from transformers import PreTrainedTokenizerBase

from llmtune.data.row import Message, Tool
from llmtune.errors import FieldError, RecipeError, nearest
from llmtune.files import digest_of
from llmtune.model.reading import TooMuch, bounded, error_words
from llmtune.model.tokens import RENDER_BYTES, RENDER_SECONDS

_OWN = {
    "messages",
    "tools",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
    "namespace",
    "dict",
    "range",
} | {
    "documents",
    "chat_template",
    "tokenize",
    "continue_final_message",
}
"""Variables of a template that no recipe gives."""
_GENERATION_TAG = re.compile(r"\{%-?\+?\s*(end)?generation\s*-?\+?%\}")


@dataclass(frozen=True)
class Request:
    """A conversation to render."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    generation_prompt: bool = False


@dataclass(frozen=True)
class Renderer:
    """A tokenizer's chat template, with the values of `data.template`."""

    tokenizer: PreTrainedTokenizerBase
    values: Mapping[str, Any] = field(default_factory=dict)

    def render(self, request: Request, where: str) -> str:
        """Render a conversation as text; raises RecipeError that names `where` if the template rejects it."""
        try:
            with bounded(RENDER_SECONDS, RENDER_BYTES):
                return self._apply(request)
        except TemplateError as error:
            raise RecipeError(f"{where}: the chat template rejects this conversation: {error_words(error)}") from error
        except (Exception, TooMuch) as error:
            # A template runs code of its own, such as `content.split('x')[1]`, and that may raise anything.
            raise RecipeError(f"{where}: the chat template fails on this conversation: {error_words(error)}") from error

    def render_all(self, requests: Sequence[Request]) -> list[str | None]:
        """Render conversations within the bounds of one; None for each where one fails: alone, it says why."""
        try:
            with bounded(RENDER_SECONDS, RENDER_BYTES):
                return [self._apply(request) for request in requests]
        except (Exception, TooMuch):
            return [None] * len(requests)

    def _apply(self, request: Request) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(request.messages),
                tools=list(request.tools) or None,
                tokenize=False,
                add_generation_prompt=request.generation_prompt,
                **self.values,
            )
        )

    def check_values(self) -> None:
        """Raise FieldError for a value of `data.template` that the template does not use."""
        if not self.values:
            return
        if not self.tokenizer.chat_template:
            raise FieldError("data.template", "the tokenizer has no chat template, so nothing uses it")
        special = self.tokenizer.special_tokens_map
        known = sorted(variables(str(self.tokenizer.chat_template)) - _OWN - set(special))
        takes = f"it takes {', '.join(known)}" if known else "it takes no values"
        for key in self.values:
            if key not in known:
                message = f"the chat template does not use {key!r} ({takes}){nearest(key, known)}"
                raise FieldError(f"data.template.{key}", message)


@lru_cache(maxsize=16)
def variables(template: str) -> frozenset[str]:
    """Return the names that a chat template expects from outside."""
    # transformers' tag for what an assistant says is none of Jinja's.
    plain = _GENERATION_TAG.sub("", template)
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateError as error:
        raise RecipeError(f"the chat template cannot be read: {error_words(error)}") from error
    return frozenset(meta.find_undeclared_variables(parsed) - _set_inside(parsed))


def _set_inside(template: nodes.Template) -> set[str]:
    """Return the variables that a template sets itself, whatever it is given; Jinja counts those set in a branch."""
    tested = {test.node.name for test in template.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    tested |= {use.node.name for use in template.find_all(nodes.Filter) if isinstance(use.node, nodes.Name)}
    names = set()
    for assign in template.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            used = {name.name for name in assign.node.find_all(nodes.Name)} | {getattr(assign.node, "name", None)}
            names |= {assign.target.name} - used
    return names - tested


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of the chat template, None without one; named templates are hashed together."""
    return digest_of(tokenizer.chat_template) if tokenizer.chat_template else None
