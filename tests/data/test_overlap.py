"""The key by which rows are compared: what changes a row's meaning stays in it, in every script."""

import sys
import time
import unicodedata

import pytest

from llmtune.data.overlap import dedup_key
from llmtune.data.row import Row


def key(text: str) -> str:
    """The content key of a row whose answer is this text."""
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": text})
    return dedup_key(Row("r", turns, "t:1")).content


DIFFERENT_WORDS = {
    "Hindi": ("\u0915\u092e\u0930\u093e", "\u0915\u092e\u0930\u0947"),
    "Bengali": ("\u09ae\u09be\u09b2", "\u09ae\u09c7\u09b2"),
    "Tamil": ("\u0baa\u0bb2\u0bcd", "\u0baa\u0bb2"),
    "Arabic": ("\u0639\u064e\u0644\u0651\u064e\u0645", "\u0639\u064f\u0644\u0650\u0645"),
    "Hebrew": ("\u05e1\u05b5\u05e4\u05b6\u05e8", "\u05e1\u05b8\u05e4\u05b7\u05e8"),
    "Thai": ("\u0e01\u0e34\u0e19", "\u0e01\u0e31\u0e19"),
    "Khmer": ("\u1780\u17b6\u179a", "\u1780\u17c1\u179a"),
    "Burmese": ("\u1019\u102c", "\u1019\u102d"),
    "Tibetan": ("\u0f58\u0f72", "\u0f58\u0f7a"),
    "Japanese, decomposed": ("\u304b\u3099", "\u304b"),
    "Korean, decomposed": ("\u1100\u1161\u11a8", "\u1100\u1161"),
    "Telugu": ("\u0c15\u0c3e", "\u0c15\u0c3f"),
    "Vietnamese, decomposed": ("ma\u0301", "ma\u0300"),
}


@pytest.mark.parametrize("script", DIFFERENT_WORDS)
def test_words_that_differ_in_marks_alone_are_different(script: str) -> None:
    one, other = DIFFERENT_WORDS[script]
    assert key(one) != key(other)
    assert key(f"{one}, {one}!") == key(f"{one} {one}")
    assert key(unicodedata.normalize("NFC", one)) == key(unicodedata.normalize("NFD", one))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\U0001f600", "\U0001f622"),
        ("Great \U0001f600", "Great \U0001f622"),
        ("\U0001f44d\U0001f3fb", "\U0001f44d\U0001f3ff"),
        ("5 \u20ac", "5 $"),
        ("a \u2192 b", "a \u2190 b"),
        ("x \u2264 y", "x \u2265 y"),
        ("a != b", "a = b"),
        ("p \u2227 q", "p \u2228 q"),
        ("3.5", "35"),
        ("1, 2", "12"),
        ("1 2 3", "123"),
        ("-3", "3"),
        ("3-4", "34"),
        ("50%", "50"),
        ("\u0663\u066b\u0665", "\u0663\u0665"),
        ("?", "!"),
        ("。", "、"),
    ],
)
def test_signs_that_change_a_meaning_stay(one: str, other: str) -> None:
    assert key(one) != key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, world!", "hello  WORLD"),
        ("well-known", "well known"),
        ("\u00bfQu\u00e9?", "que\u0301"),
        ("«да»", "да"),
        ("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u597d\u4e16\u754c"),
        ("STRASSE", "straße"),
        ("\ufb01ne", "fine"),
        ("1  2", "1\n2"),
        ("`code`", "code"),
    ],
)
def test_case_punctuation_and_space_do_not_count(one: str, other: str) -> None:
    assert key(one) == key(other)


def test_every_letter_mark_digit_and_symbol_stays_and_nothing_else_does() -> None:
    signs = "*/%&@#\\\u066a\u2030\u2031"
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        kind = unicodedata.category(char)
        if kind[0] in "LMNS" and char not in "`\u1fef":
            assert unicodedata.normalize("NFC", unicodedata.normalize("NFC", char).casefold()) in key(f"a.{char}.b"), (
                kind
            )
        elif (kind[0] in "PZ" or kind in ("Cc", "Cf")) and char not in signs:
            assert key(f"a{char}b") == key("ab"), hex(code)


def test_time_grows_with_the_length_alone() -> None:
    began = time.process_time()
    for text in ("1" + "!" * 1_000_000 + "1", "1 " * 500_000, "x, y. " * 200_000, "-" * 1_000_000 + "1"):
        key(text)
    assert time.process_time() - began < 5
