"""Finds an answer in the text of a conversation that ends with it.

The answer is what the rendered conversation has behind its prompt: the rendered turns before it with the template's
generation prompt. It ends with the stop token. An empty thinking block that the template puts there itself belongs to
the prompt: a model is served, and evaluated, from behind it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from llmtune.data.encoding.rendering.explain import explain
from llmtune.data.encoding.rendering.fields import DroppedField, Fields, call_texts, check_thought, with_text_arguments
from llmtune.data.encoding.rendering.reasoning import (
    FIELDS,
    after_thought,
    before_block,
    empty_block_end,
    split_thought,
    without_thought,
    write_thought,
)
from llmtune.data.encoding.rules import Rules
from llmtune.data.encoding.template import Renderer, Request
from llmtune.data.row import Message, Row
from llmtune.errors import RecipeError

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Turn:
    """An answer as the end of a rendered conversation; places are indices into `end`."""

    end: str
    """The text up to the end of the answer's stop token."""
    generation: int
    """Where the template's generation prompt ends."""
    prompt: int
    """Where generation starts: behind the empty thinking block that the template puts there, if it does."""
    learned: int
    """Where the learned text starts: `prompt`, or behind the reasoning where that is context."""
    adds: str = ""
    """What else the template itself puts before the content; it is learned."""


@dataclass(frozen=True)
class Answers:
    """Finds answers with one chat template, by the rules of one recipe."""

    renderer: Renderer
    stops: tuple[str, ...]
    """The texts of the stop tokens."""
    rules: Rules

    @cached_property
    def fields(self) -> Fields:
        """What the template renders."""
        return Fields(self.renderer)

    def prepare(self, row: Row) -> Row:
        """Return a row whose reasoning stands where the template takes it, or is left out; raises DroppedField."""
        self.fields.check_tools(row)
        messages = list(row.messages)
        if any(message.get("tool_calls") for message in messages) and self.fields.takes_text_arguments:
            messages = [with_text_arguments(message) for message in messages]
        if self.rules.reasoning == "drop":
            messages = [without_thought(message) for message in messages]
        elif any((message.get(FIELDS[0]) or "").strip() for message in messages):
            if not self.fields.reasoning:
                raise DroppedField(
                    f"{row.where}: has reasoning_content, but the chat template does not render it; "
                    "use data.reasoning: drop, or put it into the content"
                )
            messages = [write_thought(message, self.fields.reasoning) for message in messages]
        return row if messages == list(row.messages) else replace(row, messages=tuple(messages))

    def requests(self, row: Row, index: int) -> tuple[Request, Request]:
        """Return what is rendered for the answer of message `index`: the turns before it, and those up to it."""
        before = Request(row.messages[:index], row.tools, generation_prompt=True)
        return before, Request(row.messages[: index + 1], row.tools)

    def last(self, row: Row, texts: Sequence[str | None] = (None, None)) -> Turn:
        """Find a row's last answer; raises RecipeError that says why the model could not learn it.

        `texts` are the rendered requests, where they are there already.
        """
        index = len(row.messages) - 1
        prompt, rendered = self._rendered(row, index, texts)
        turn = self._find(row, index, prompt, rendered)
        self.fields.check_row(row, turn.end if turn else rendered)
        if turn is None:
            raise RecipeError(f"{row.where}: {self._explain(prompt, rendered, row.messages[index])}")
        return turn

    def at(self, row: Row, index: int) -> Turn | None:
        """Find the answer of message `index` in the conversation that ends with it; None if it cannot be learned.

        Raises DroppedField where the template leaves out its reasoning, and for tool calls that cannot be learned.
        """
        try:
            prompt, rendered = self._rendered(row, index)
            turn = self._find(row, index, prompt, rendered)
        except DroppedField:
            raise
        except RecipeError:
            return None
        if turn is None and row.messages[index].get("tool_calls"):
            raise DroppedField(f"{row.where}: {self._explain(prompt, rendered, row.messages[index])}")
        return turn

    def _explain(self, prompt: str, rendered: str, message: Message) -> str:
        return explain(prompt, rendered, message, self.stops, self.renderer.tokenizer)

    def _rendered(self, row: Row, index: int, texts: Sequence[str | None] = (None, None)) -> tuple[str, str]:
        prompt, rendered = (
            self.renderer.render(request, row.where) if text is None else text
            for text, request in zip(texts, self.requests(row, index), strict=True)
        )
        return prompt, rendered

    def _find(self, row: Row, index: int, prompt: str, rendered: str) -> Turn | None:
        """Find an answer behind its prompt: reasoning, content (some templates strip it), calls, stop token."""
        message, start = row.messages[index], len(prompt)
        thought, content = split_thought(message)
        if not rendered.startswith(prompt):
            rendered = self._behind(prompt, rendered, row, message)
        check_thought(row, message, thought, rendered[start:] if rendered.startswith(prompt) else rendered)
        if not rendered.startswith(prompt):
            return None
        thought_end = rendered.find(thought.strip(), start) + len(thought.strip()) if thought.strip() else start
        place = self._place(rendered, thought_end, message, content)
        if place is None:
            rendered += self._next_stop(row, index, rendered)
            place = self._place(rendered, thought_end, message, content)
        if place is None:
            return None
        at, end = place
        if thought.strip():
            block = self._block_end(rendered, start, thought_end - len(thought.strip()))
            learned = block
            if self.rules.reasoning == "context":
                learned = self._behind_thought(row, index, prompt, rendered[:end], thought_end, at)
            return Turn(rendered[:end], start, block, learned)
        block = self._block_end(rendered, start, at)
        adds = "" if message.get("tool_calls") else rendered[block : max(block, at)].strip()
        return Turn(rendered[:end], start, block, block, adds)

    def _block_end(self, text: str, start: int, at: int) -> int:
        """Return where the template's empty thinking block before an answer ends; `start` for none."""
        end = empty_block_end(text, start, at)
        # The block's last line breaks may be taken for the content's own, which the template strips.
        usual = start + len(self.fields.block)
        return usual if end > start and usual > end and text.startswith(self.fields.block, start) else end

    def _behind(self, prompt: str, rendered: str, row: Row, message: Message) -> str:
        """Return an answer behind the prompt that generation sees, where the template rewrites that once it is given.

        Some leave out an empty thinking block, a system turn, or reasoning. What cannot be told apart stays as it is.
        """
        base = before_block(prompt)
        if base != prompt and rendered.startswith(base):
            return prompt + rendered[len(base) :]
        rest = self._rest_alone(row, message)
        return prompt + rest if rest and rendered.endswith(rest) else rendered

    def _next_stop(self, row: Row, index: int, rendered: str) -> str:
        """Return the stop token with which the template starts the next turn, where it puts none behind an answer."""
        following: Message = {"role": "user", "content": "a"}
        question, answer = following, without_thought(row.messages[index])
        if answer.get("tool_calls"):
            call = answer["tool_calls"][-1]
            following = {"role": "tool", "content": "a", "name": call["function"]["name"]}
            following["tool_call_id"] = call.get("id", "")
        turns = [question, answer, following]
        try:
            text, longer = (self.renderer.render(Request(turns[:count], row.tools), row.where) for count in (2, 3))
        except RecipeError:
            return ""
        is_same = longer.startswith(text) and text.endswith(rendered[-1:])
        return next((stop for stop in self.stops if is_same and longer.startswith(stop, len(text))), "")

    def _rest_alone(self, row: Row, message: Message) -> str:
        """Return what the template puts behind the prompt of an answer to a short question; "" where it rewrites it."""
        question = replace(row, messages=({"role": "user", "content": "a"}, message))
        try:
            prompt, rendered = self._rendered(question, 1)
        except RecipeError:
            return ""
        starts = (start for start in (prompt, before_block(prompt)) if rendered.startswith(start))
        return next((rendered[len(start) :] for start in starts), "")

    def _place(self, text: str, start: int, message: Message, content: str) -> tuple[int, int] | None:
        """Return where an answer's content starts, and where its stop token ends."""
        if message.get("tool_calls"):
            end = self._end_of_calls(text, start, message)
            at = text.find(content.strip(), start) if content.strip() else end
            return None if end is None or at is None or at < 0 else (at, end)
        own = message["content"]  # with its empty thinking block, where it has one: then that is the row's own text
        for form in dict.fromkeys((own, own.strip(), content, content.strip())):
            at = text.find(form, start)
            while at >= 0:
                end = self.stop_end(text, at + len(form))
                if end is not None:
                    return at, end
                at = text.find(form, at + 1)
        return None

    def stop_end(self, text: str, start: int) -> int | None:
        """Return where the stop token ends that follows `start`; only white space may stand between them."""
        space = _SPACE.match(text, start)
        assert space is not None
        ends = [at + len(stop) for stop in self.stops for at in (start, space.end()) if text.startswith(stop, at)]
        return max(ends) if ends else None

    def _end_of_calls(self, text: str, start: int, message: Message) -> int | None:
        """Return where the stop token behind an answer's tool calls ends; None if there is none, or one inside."""
        end = max((at + len(stop) for stop in self.stops if (at := text.rfind(stop, start)) >= 0), default=None)
        while end is not None:  # a template may put several stop tokens there; generation ends at the first
            stop = next(stop for stop in self.stops if text.endswith(stop, start, end))
            before = len(text[: end - len(stop)].rstrip())
            if not any(text.endswith(other, start, before) for other in self.stops):
                values = [message["content"], *call_texts(message)]
                inside = (text.count(other, start, end - len(stop)) for other in self.stops)
                known = (sum(value.count(other) for value in values) for other in self.stops)
                return None if any(a > b for a, b in zip(inside, known, strict=True)) else end
            end = before
        return None

    def _behind_thought(self, row: Row, index: int, prompt: str, text: str, thought_end: int, at: int) -> int:
        """Return where the learned text starts in an answer whose reasoning is context."""
        bare = without_thought(row.messages[index])
        rest = self._rest_alone(row, bare)
        if not rest:
            rendered = self.renderer.render(Request([*row.messages[:index], bare], row.tools), row.where)
            rest = rendered[len(prompt) :] if rendered.startswith(prompt) else rendered
        if not any(stop in rest for stop in self.stops):  # the next turn starts with it
            rest += next(stop for stop in self.stops if text.endswith(stop))
        return after_thought(text, thought_end, at, rest[: self._last_stop(rest)])

    def _last_stop(self, text: str) -> int:
        return max((at + len(stop) for stop in self.stops if (at := text.rfind(stop)) >= 0), default=len(text))
