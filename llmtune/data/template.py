"""The chat template's view of a row: where each answer starts and where its stop token ends, in the rendered text."""

import hashlib
import json
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llmtune.data.rows import Message, Row
from llmtune.errors import RecipeError


@dataclass(frozen=True)
class Turn:
    """An assistant turn in the rendered conversation."""

    prompt: str
    """The text that generation starts from: everything before the answer."""
    end: str
    """The text up to the end of the turn's stop token; starts with `prompt`."""
    adds: str = ""
    """What the template puts between the two on its own, such as an empty think block."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, generation_prompt: bool = False
) -> str:
    """The conversation as text; raises RecipeError naming `where` for one that the template refuses."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        raise RecipeError(f"{where}: the chat template refuses this conversation: {error}") from error
    return str(text)


def turns(row: Row, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> list[Turn]:
    """The assistant turns, each as it stands where it is the last; RecipeError where the row's last one does not."""
    places = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    found = []
    for place in places:
        prompt = render(tokenizer, list(row.messages[:place]), row.where, True)
        shown = render(tokenizer, list(row.messages[: place + 1]), row.where)
        turn = _turn(prompt, shown, row.messages[place]["content"], stops)
        if turn is not None:
            found.append(turn)
        elif place == places[-1]:
            raise RecipeError(f"{row.where}: {_reason(prompt, shown, row.answer.strip(), tokenizer, stops)}")
    return found


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of the chat template, None without one; named templates are hashed together."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _turn(prompt: str, shown: str, answer: str, stops: list[str]) -> Turn | None:
    """The turn at the end of `shown`, None where that is not prompt, answer (some templates strip it), stop token."""
    if not shown.startswith(prompt):
        return None
    for words in (answer, answer.strip()):
        at = shown.find(words, len(prompt))
        while at >= 0:
            end = _stop_end(shown, at + len(words), stops)
            if end is not None:
                return Turn(prompt, shown[:end], shown[len(prompt) : at].strip())
            at = shown.find(words, at + 1)
    return None


def _stop_end(shown: str, start: int, stops: list[str]) -> int | None:
    """Where the stop token ends that follows `start`, with nothing but white space before it."""
    rest = shown[start:]
    space = len(rest) - len(rest.lstrip())
    ends = [at + len(stop) for stop in stops for at in (0, space) if rest.startswith(stop, at)]
    return start + max(ends) if ends else None


def _reason(prompt: str, shown: str, answer: str, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> str:
    """Why the last turn cannot be learned."""
    if not shown.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, shown, strict=False)) if a != b), len(shown))
        asked, there = prompt[at : at + 30], shown[at : at + 30]
        return (
            f"the chat template rewrites earlier turns: it asks for an answer after {asked!r} but shows {there!r} there"
        )
    at = shown.find(answer, len(prompt))
    if at < 0:
        return f"the chat template rewrites the answer: {answer[:30]!r} does not stand in it as written"
    rest = shown[at + len(answer) :].strip()
    first = tokenizer.decode(tokenizer(rest, add_special_tokens=False)["input_ids"][:1]) if rest else ""
    ends = f"ends an answer with {first!r}" if first else "puts nothing after an answer"
    stop = " or ".join(repr(stop) for stop in stops)
    return f"the chat template {ends}, but the model stops at {stop}: it would never learn to stop"
