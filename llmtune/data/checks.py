"""Checks of single rows and examples: what no model could learn from is refused with the row's place."""

import json
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from llmtune.data.example import IGNORED, Example
from llmtune.data.row import Message, Row
from llmtune.errors import RecipeError


def check_stop(examples: Iterable[Example], stop: set[int]) -> None:
    """Raise RecipeError where an example, but a piece of plain text, does not end in a learned stop token."""
    for example in examples:
        if example.labels[-1] not in stop and not example.is_text:
            raise RecipeError(
                f"{example.where}: does not end in a learned stop token; the tuned model would not stop either"
            )


def check_ids(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> None:
    """Raise RecipeError where a row has a token that the model, with that many embeddings, has none of."""
    if vocabulary is None:
        return
    for example in examples:
        highest = max(example.input_ids)
        if highest >= vocabulary:
            raise RecipeError(
                f"{example.where}: has the token {tokenizer.convert_ids_to_tokens(highest)!r} with the id {highest}, "
                f"but the model has {vocabulary} tokens: its tokenizer is another model's, or was added to"
            )


def check_bos(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RecipeError where an example starts with two BOS tokens."""
    bos = tokenizer.bos_token_id
    for example in examples:
        if bos is not None and example.input_ids[:2] == [bos, bos]:
            raise RecipeError(
                f"{example.where}: starts with {tokenizer.bos_token!r} twice; remove it from the row or the template"
            )


def is_learned(example: Example) -> bool:
    """Whether any token of an example is learned."""
    return any(label != IGNORED for label in example.labels)


def with_special_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Find rows whose text contains a special token, which the model would read as one; returns their ids."""
    special = [token for token in tokenizer.all_special_tokens if token]
    texts = ((row, "\n".join([row.text or "", *map(_written, row.messages)])) for row in rows)
    return [row.id for row, text in texts if any(token in text for token in special)]


def _written(turn: Message) -> str:
    """Return what a turn gives to the template: content, reasoning and tool calls."""
    if len(turn) == 2:  # role and content
        return str(turn["content"])
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return "\n".join([str(turn["content"]), turn.get("reasoning_content") or "", calls])
