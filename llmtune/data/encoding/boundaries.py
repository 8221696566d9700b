"""Where places in a text stand among its tokens, if the text up to there, tokenized alone, gives the same tokens."""

from bisect import bisect_left, bisect_right

from transformers import PreTrainedTokenizerBase

from llmtune.errors import RecipeError

_WINDOW, _COMPARED = 16, 8
"""Tokens before a place that are tokenized alone, and how many of them must come out the same."""
_ALONE = 100_000
"""Characters that are tokenized in complete starts of the text, for places that the window does not prove."""


def token_positions(text: str, ids: list[int], places: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Return how many of a text's tokens stand before each place (an index into the text).

    A place is left out where a token spans it, or where the text up to it has other tokens than the complete text.
    """
    positions = _near(text, ids, places, tokenizer) if tokenizer.is_fast else {}
    left = _ALONE
    for place in (place for place in places if place not in positions):
        left -= place
        if left < 0:
            break
        start = tokenize(tokenizer, [text[:place]])[0]
        if ids[: len(start)] == start:
            positions[place] = len(start)
    return positions


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenize each text; special tokens in it count as such, and none are added."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def missing_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return [BOS] if the tokenizer puts one before texts and these ids do not start with it, else []."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos] if adds and ids[:1] != [bos] else []


def _near(text: str, ids: list[int], places: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Return the positions that offsets of the tokens give, and the tokens before each place confirm."""
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"][0]
    ends = [end for _, end in offsets]
    positions = {place: bisect_right(ends, place) for place in places}
    windows = [text[_window(offsets, position) : place] for place, position in positions.items()]
    confirmed = {}
    for (place, position), window in zip(positions.items(), tokenize(tokenizer, windows), strict=True):
        count = position if position <= _WINDOW else _COMPARED
        if position and window[-count:] == ids[position - count : position]:
            confirmed[place] = position
    return confirmed


def _window(offsets: list[tuple[int, int]], position: int) -> int:
    """Return where in the text the tokens start that are tokenized alone."""
    return 0 if position <= _WINDOW else offsets[position - _WINDOW][0]


def covering(
    text: str, ids: list[int], spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[tuple[int, int]]:
    """Return the range of tokens that have any character of each span of a text; `ids` are the text's, tokenized alone.

    Raises RecipeError where a tokenizer without offsets joins a span and the text around it.
    """
    if not spans:
        return []
    if not tokenizer.is_fast:
        positions = token_positions(text, ids, [place for span in spans for place in span], tokenizer)
        if any(place not in positions for span in spans for place in span):
            raise RecipeError(f"{where}: the tokenizer joins a tool's result and the text around it")
        return [(positions[start], positions[end]) for start, end in spans]
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"][0]
    ends = [end for _, end in offsets]
    # A token's offsets may leave out white space, and the tokens of one character share theirs.
    starts = [min(start, before) for (start, _), before in zip(offsets, [0, *ends], strict=False)]
    return [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]
