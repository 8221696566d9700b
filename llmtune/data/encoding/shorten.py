"""What becomes of rows over `max_length` tokens: cut at the start of their prompt, cut at a turn, or left out."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.boundaries import tokenize
from llmtune.data.encoding.conversation import RowTurns
from llmtune.data.encoding.lengths import is_long, least_tokens
from llmtune.data.encoding.rules import Rules
from llmtune.data.example import IGNORED, Example


def last_fitting(turns: RowTurns, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int | None:
    """Return the index of the last answer, but not the row's own last, up to which a conversation fits; None if none.

    Lengths grow with the turns, so that halving finds it.
    """
    fitting, too_long = -1, len(turns.indices) - 1
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if _fits(turns, turns.indices[middle], tokenizer, max_length):
            fitting = middle
        else:
            too_long = middle
    return turns.indices[fitting] if fitting >= 0 else None


def _fits(turns: RowTurns, index: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    turn = turns.turn(index)
    if turn is None:
        return False
    if is_long(turn.end, max_length) and least_tokens(turn.end, max_length, lambda t: tokenize(tokenizer, [t])[0]):
        return False
    return len(tokenize(tokenizer, [turn.end])[0]) <= max_length


def fit(example: Example, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> Example | None:
    """Apply the rule for rows over `max_length` tokens; returns None where the example is dropped."""
    size = len(example.input_ids)
    if size <= rules.max_length:
        return example
    labelled = (index for index, label in enumerate(example.labels) if label != IGNORED)
    first = example.prompt_size if rules.learn == "all" else next(labelled)
    kept = int(example.input_ids[0] == tokenizer.bos_token_id)
    cut = size - rules.max_length
    # At least one token of the prompt stays: without any, the answer would have no question.
    if rules.overlength != "truncate_prompt" or kept + cut >= first:
        return None
    ids, labels = (values[:kept] + values[kept + cut :] for values in (example.input_ids, example.labels))
    return replace(example, input_ids=ids, labels=labels, prompt_size=example.prompt_size - cut)
