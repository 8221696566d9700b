"""Reads what `--over` says: `method.lr=1e-4..1e-2:log`, `method.adapter.rank=8,16,32`."""

import math
import re
from collections.abc import Sequence

from llmtune.errors import RecipeError
from llmtune.searching.space import Choice, Range, Value

_WHOLE = re.compile(r"[-+]?\d+")
_EXAMPLE = "write a range such as method.lr=1e-4..1e-2:log, or values such as method.adapter.rank=8,16,32"
_OPENS, _CLOSES = "[{", "]}"


def read_space(words: Sequence[str]) -> dict[str, Range | Choice]:
    """What is drawn for each key that the words name; raises RecipeError, with the word, for what is no range."""
    space: dict[str, Range | Choice] = {}
    for word in words:
        key, mark, text = word.partition("=")
        if not (key.strip() and mark and text.strip()):
            raise RecipeError(f"--over {word}: {_EXAMPLE}")
        if key.strip() in space:
            raise RecipeError(f"--over {word}: {key.strip()} is there twice; give all of its values at once")
        space[key.strip()] = _dimension(word, text.strip())
    if not space:
        raise RecipeError(f"--over: is needed; {_EXAMPLE}")
    return space


def _dimension(word: str, text: str) -> Range | Choice:
    body, _, scale = text.rpartition(":")
    is_log = scale == "log" and bool(body)
    low, mark, high = (body if is_log else text).partition("..")
    if mark:
        if not is_log and ":" in high:
            raise RecipeError(f"--over {word}: {high.partition(':')[2]} is no scale; the one there is, is log")
        return _range(word, low, high, is_log)
    if is_log:
        raise RecipeError(f"--over {word}: log is for a range, such as {word.partition('=')[0]}=1e-4..1e-2:log")
    values = tuple(map(_value, _split(text)))
    if len(values) < 2:
        raise RecipeError(f"--over {word}: is one value, which --set {word} sets; give two or more, or a range")
    if len(set(values)) < len(values):
        raise RecipeError(f"--over {word}: gives one value twice")
    return Choice(values)


def _range(word: str, low: str, high: str, is_log: bool) -> Range:
    ends = [_value(low.strip()), _value(high.strip())]
    for text, end in zip((low, high), ends, strict=True):
        if isinstance(end, str) or end is None:
            what = f"{text} is no number" if text.strip() else "an end is missing"
            raise RecipeError(f"--over {word}: {what}; a range is LOW..HIGH")
    first, last = (float(str(end)) for end in ends)
    if first >= last:
        raise RecipeError(f"--over {word}: the range is empty; its lower end comes first")
    if is_log and first <= 0:
        raise RecipeError(f"--over {word}: a range by logarithm begins above 0")
    return Range(first, last, is_log, all(isinstance(end, int) for end in ends))


def _value(text: str) -> Value:
    """A number, or the text as it is."""
    text = text.strip()
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPENS) - (letter in _CLOSES)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
