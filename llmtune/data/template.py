"""Renders a row with the chat template, and finds where each answer starts and where its stop token ends."""

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llmtune.data.rows import Message, Row
from llmtune.errors import RecipeError
from llmtune.files import digest_of
from llmtune.model.reading import TooMuch, bounded, one_line
from llmtune.model.tokens import RENDER_BYTES, RENDER_SECONDS


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
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, generation_prompt: bool = False
) -> str:
    """Render a conversation as text; raises RecipeError that names `where` if the template rejects it."""
    try:
        with bounded(RENDER_SECONDS, RENDER_BYTES):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        raise RecipeError(f"{where}: the chat template rejects this conversation: {one_line(error)}") from error
    except (Exception, TooMuch) as error:
        raise RecipeError(f"{where}: the chat template fails on this conversation: {one_line(error)}") from error
    return str(text)


def find_turns(row: Row, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> list[Turn]:
    """Find the assistant turns, each rendered as the last turn; raises RecipeError if the row's last is not found."""
    indices = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    turns = []
    for index in indices:
        prompt = render(tokenizer, list(row.messages[:index]), row.where, True)
        rendered = render(tokenizer, list(row.messages[: index + 1]), row.where)
        turn = _last_turn(prompt, rendered, row.messages[index]["content"], stops)
        if turn is not None:
            turns.append(turn)
        elif index == indices[-1]:
            raise RecipeError(f"{row.where}: {_reason(prompt, rendered, row.answer.strip(), tokenizer, stops)}")
    return turns


def template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of the chat template, None without one; named templates are hashed together."""
    return digest_of(tokenizer.chat_template) if tokenizer.chat_template else None


def _last_turn(prompt: str, rendered: str, answer: str, stops: list[str]) -> Turn | None:
    """Find the turn at the end of a text: prompt, answer (some templates strip it), stop token; else None."""
    if not rendered.startswith(prompt):
        return None
    for text in (answer, answer.strip()):
        at = rendered.find(text, len(prompt))
        while at >= 0:
            end = _stop_end(rendered, at + len(text), stops)
            if end is not None:
                return Turn(prompt, rendered[:end], rendered[len(prompt) : at].strip())
            at = rendered.find(text, at + 1)
    return None


def _stop_end(rendered: str, start: int, stops: list[str]) -> int | None:
    """Return where the stop token ends that follows `start`; only white space may stand between them."""
    rest = rendered[start:]
    space = len(rest) - len(rest.lstrip())
    ends = [at + len(stop) for stop in stops for at in (0, space) if rest.startswith(stop, at)]
    return start + max(ends) if ends else None


def _reason(prompt: str, rendered: str, answer: str, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> str:
    """Say why the model could not learn the last turn."""
    if not rendered.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), len(rendered))
        before, after = prompt[at : at + 30], rendered[at : at + 30]
        return f"the chat template changes the text before an answer: {before!r} becomes {after!r} once it is given"
    at = rendered.find(answer, len(prompt))
    if at < 0:
        return f"the chat template changes the answer: the rendered text does not contain {answer[:30]!r}"
    rest = rendered[at + len(answer) :].strip()
    first = tokenizer.decode(tokenizer(rest, add_special_tokens=False)["input_ids"][:1]) if rest else ""
    ends = f"ends an answer with {first!r}" if first else "puts nothing after an answer"
    stop = " or ".join(repr(stop) for stop in stops)
    return f"the chat template {ends}, but the model stops at {stop}: the tuned model would not stop"
