"""Plain texts for continued pre-training: joined, cut into pieces of `max_length` tokens, and learned throughout."""

from collections.abc import Iterator
from itertools import chain

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.boundaries import missing_bos, tokenize
from llmtune.data.example import Example
from llmtune.data.row import Row
from llmtune.errors import RecipeError

_BATCH = 256
"""Texts that are tokenized in one call."""
_SLICE = 100_000
"""Characters of a document that are tokenized in one call; longer ones are cut where that changes no token."""
_AROUND = 200
"""Characters on both sides of a cut whose tokens must be those of the text without it."""
_TRIED = 16
"""Places that are tried for a cut."""


def encode_texts(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Example]:
    """Yield the pieces of documents, each document followed by EOS, and after BOS where the tokenizer adds one.

    A document of several rows has them once; where its next row is not there, the piece ends. A piece is named after
    the row in which it starts. The last one may be shorter.
    """
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"{rows[0].where}: the tokenizer has no EOS token to put between texts")
    ids: list[int] = []
    starts: list[tuple[int, Row]] = []  # where the documents of `ids` start
    pieces = 0
    bos = missing_bos(tokenizer, [])
    cut = ""  # the place of the row before, where its document goes on
    for row, document in _documents(rows, tokenizer):
        if ids and cut not in ("", row.continues):
            pieces += 1
            yield _piece(starts[0][1], pieces, ids)
            ids = []
        cut = row.where if row.goes_on else ""
        if not ids:
            starts.clear()
        starts.append((len(ids), row))
        ids += with_ends(row, document, bos, tokenizer.eos_token_id)
        while len(ids) >= max_length:
            piece, ids = ids[:max_length], ids[max_length:]
            pieces, first = pieces + 1, starts[0][1]
            yield _piece(first, pieces, piece)
            moved = [(at - max_length, document_row) for at, document_row in starts]
            starts = moved[max((i for i, (at, _) in enumerate(moved) if at <= 0), default=0) :]
    if ids:
        yield _piece(starts[0][1], pieces + 1, ids)


def with_ends(row: Row, ids: list[int], bos: list[int], eos: int) -> list[int]:
    """Return a text's ids after BOS, if the tokenizer adds `bos`, and before EOS; a cut is neither start nor end."""
    begin = [] if row.continues or ids[:1] == bos else bos
    return [*begin, *ids, *([] if row.goes_on else [eos])]


def _documents(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Row, list[int]]]:
    """Yield each row with its text's ids; many texts are tokenized in one call."""
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        pieces = [list(slices(row.text or "", tokenizer)) for row in batch]
        ids = iter(tokenize(tokenizer, list(chain.from_iterable(pieces))))
        for row, of_row in zip(batch, pieces, strict=True):
            yield row, list(chain.from_iterable(next(ids) for _ in of_row))


def slices(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield a text in pieces that have its tokens when each is tokenized alone; they are cut at white space.

    A text of one word of megabytes is cut inside of it.
    """
    start = 0
    while len(text) - start > _SLICE:
        end = _cut(text, start + _SLICE, tokenizer)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, near: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the last place before `near` at which a cut changes no token around it, else any at white space."""
    at, places = near, list[int]()
    for _ in range(_TRIED):
        at = max(text.rfind(space, near - _SLICE // 2, at) for space in " \n")
        if at < 0:
            break
        before, after = text[at - _AROUND : at], text[at : at + _AROUND]
        first, second, both = tokenize(tokenizer, [before, after, before + after])
        if first + second == both:
            return at
        places.append(at)
    return places[0] if places else near


def _piece(row: Row, number: int, ids: list[int]) -> Example:
    return Example(f"{row.id}#{number}", row.where, ids, list(ids), is_text=True)
