"""A chat template as text around each role's content, and the same as a Go template, which Ollama renders.

Ollama reads no Jinja. Of the templates that it does not know by heart it must be given a Go template, so one is derived
here from what the Jinja template renders, and kept only where both give the same text.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
_SYSTEM, _USER, _ANSWER, _MORE = "ASystemText", "AUserText", "AnAnswerText", "AnotherUserText"


@dataclass(frozen=True)
class ChatFormat:
    """The text before and after the content of each role, and what an answer starts after."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str
    """The text from which an answer is generated."""
    default_system: str | None
    """The system prompt of a conversation that has none; None where there is no such prompt."""

    def render(self, messages: Messages) -> str:
        """The text of a conversation, up to where an answer is generated, as the Go template renders it."""
        turns = list(messages)
        if self.default_system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.default_system})
        parts = [self._turn(turn, turn is turns[-1]) for turn in turns]
        return "".join(parts)

    def _turn(self, turn: dict[str, Any], is_last: bool) -> str:
        before, after = {"system": self.system, "user": self.user, "assistant": self.assistant}[turn["role"]]
        if turn["role"] == "assistant":
            return before + turn["content"] + ("" if is_last else after)
        return before + turn["content"] + after + (self.opening if is_last else "")

    def go_template(self) -> str:
        """The format in Go's template language, with the names that Ollama gives."""
        system, user = ("{{ .Content }}".join(pair) for pair in (self.system, self.user))
        assistant = f"{self.assistant[0]}{{{{ .Content }}}}{{{{ if not $last }}}}{self.assistant[1]}{{{{ end }}}}"
        return (
            "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
            f'{{{{ if and (ne .Role "assistant") $last }}}}{self.opening}{{{{ end }}}}{{{{ end }}}}'
        )


def chat_format(
    tokenizer: PreTrainedTokenizerBase,
    stops: list[str],
    values: dict[str, Any],
    adds_bos: bool,
    samples: list[Messages],
) -> ChatFormat | None:
    """The format of a tokenizer's chat template; None where text around each role's content does not make it.

    `values` are those of `data.template`. It is compared with what the template renders of the `samples`, which end
    before an answer, and of conversations of its own. A BOS that is added to every text is left out.
    """
    bos = str(tokenizer.bos_token or "") if adds_bos else ""

    def render(messages: Messages, opens: bool = True) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens, **values)
        return str(text).removeprefix(bos)

    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    answer, more = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _MORE}
    try:
        form = _derive(render([system, user, answer, more]), render([user]), render([user], False), stops)
        own: list[Messages] = [[system, user], [user], [user, answer, more], [system, user, answer, more]]
        for messages in [*own, *samples]:
            if form.render(messages) != render(messages):
                return None
    except Exception:  # a template that refuses a role, or whose text has other parts
        return None
    literals = (*form.system, *form.user, *form.assistant, form.opening, form.default_system or "")
    return None if any("{{" in text or '"""' in text for text in literals) else form


def _derive(full: str, alone: str, closed: str, stops: list[str]) -> ChatFormat:
    """The format of three renderings: system, user, answer and user; one user with and without an opening.

    Raises ValueError where they cannot be cut.
    """
    before_system, rest = _cut(full, _SYSTEM)
    system_to_user, rest = _cut(rest, _USER)
    user_to_answer, rest = _cut(rest, _ANSWER)
    answer_to_user, end = _cut(rest, _MORE)
    first, after_user = _cut(closed, _USER)
    after_answer = _through_stop(answer_to_user, stops)
    before_user = answer_to_user.removeprefix(after_answer)
    after_system = _without(system_to_user, before_user)
    default = None
    if first != before_user:  # a system prompt that the template brings
        middle = _without(first, after_system + before_user)
        if not middle.startswith(before_system):
            raise ValueError("other text is before a first user's turn")
        default = middle.removeprefix(before_system)
    if not end.startswith(after_user) or not user_to_answer.startswith(after_user) or not alone.startswith(first):
        raise ValueError("the end of a user's turn depends on what follows")
    return ChatFormat(
        (before_system, after_system),
        (before_user, after_user),
        (user_to_answer.removeprefix(after_user), after_answer),
        end.removeprefix(after_user),
        default,
    )


def _cut(text: str, at: str) -> tuple[str, str]:
    before, mark, after = text.partition(at)
    if not mark:
        raise ValueError(f"{at} is not in the text")
    return before, after


def _without(text: str, ending: str) -> str:
    if not text.endswith(ending):
        raise ValueError("a turn starts in several ways")
    return text.removesuffix(ending)


def _through_stop(text: str, stops: list[str]) -> str:
    """The start of a text up to its first stop token, with the line breaks that follow it."""
    places = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not places:
        raise ValueError("an answer ends at no stop token")
    rest = text[min(places) :]
    return text[: min(places)] + rest[: len(rest) - len(rest.lstrip("\n"))]
