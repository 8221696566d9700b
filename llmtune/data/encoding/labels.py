"""A conversation's token ids, and which of them are learned."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.boundaries import covering, token_positions, tokenize
from llmtune.data.encoding.conversation import Conversation
from llmtune.data.example import IGNORED
from llmtune.errors import RecipeError


@dataclass(frozen=True)
class Labelled:
    """Token ids with their labels."""

    ids: list[int]
    labels: list[int]
    prompt_size: int
    """Tokens from which generation of the last answer starts."""
    answers: frozenset[int]
    """The indices of the messages, other than the last, that are learned."""


def label(
    text: Conversation, prompt: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase, where: str, learn: str
) -> Labelled:
    """Label a conversation's ids, which start with its prompt's; both are tokenized alone.

    Raises RecipeError where the tokenizer joins a prompt and what is learned.
    """
    if ids[: len(prompt)] != prompt:
        ids = prompt + _continue(prompt, text.text[text.prompt :], ids, tokenizer, where)
    start = len(prompt)
    if text.learned > text.prompt:
        context = tokenize(tokenizer, [text.text[: text.learned]])[0]
        if context[:start] != prompt:
            context = prompt + _continue(prompt, text.text[text.prompt : text.learned], context, tokenizer, where)
        if ids[: len(context)] != context:
            ids = context + _continue(context, text.text[text.learned :], ids, tokenizer, where)
        start = len(context)
    labels = [IGNORED] * start + ids[start:]
    question = text.text[: text.prompt]
    if learn == "all":
        labels[: len(prompt)] = prompt
        for begin, end in covering(question, prompt, list(text.masked), tokenizer, where):
            labels[begin:end] = [IGNORED] * (end - begin)
    learned = set()
    if text.earlier:
        places = [place for _, span in text.earlier for place in (span.learned, span.end)]
        positions = token_positions(question, prompt, places, tokenizer)
        for index, span in text.earlier:
            opened, closed = positions.get(span.learned), positions.get(span.end)
            if opened is not None and closed is not None:
                labels[opened:closed] = ids[opened:closed]
                learned.add(index)
    return Labelled(ids, labels, len(prompt), frozenset(learned))


def _continue(
    start: list[int], rest: str, complete: list[int], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[int]:
    """Return the ids of a text's rest where one token would span the end of `start` and the rest's beginning."""
    # Some tokenizers add a space before the first word of a text: behind a line break they do not.
    for guard in ("", "\n"):
        before, guarded = tokenize(tokenizer, [guard, guard + rest])
        ids = guarded[len(before) :]
        if guarded[: len(before)] == before and tokenizer.decode(start + ids) == tokenizer.decode(complete):
            return ids
    raise RecipeError(
        f"{where}: the tokenizer joins the end of the prompt and the start of the answer ({rest[:20]!r}); "
        "remove white space at the end of the prompt"
    )
