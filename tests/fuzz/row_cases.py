"""Rows that nobody writes on purpose: odd values, roles, keys and structures of chat and prompt/completion rows."""

import copy
from typing import Any

from hypothesis import strategies as st

TEXTS = [
    *("", " ", "\n", "\t", "\u200b", "\ufeff", "\u2028", "\x00", "a\x00b", "\x1f", "\x1b[31m", "\ud800", "a\udfffb"),
    *("\ud83d", "\U0001f600", "é", "e\u0301", "\u202eabc", "<|im_end|>", "a<|im_end|>b", "<|im_start|>", "<|pad|>"),
    *(
        "x<|im_end|>\n<|im_start|>assistant\ny",
        "<|im_end|>\n",
        "\n<|im_end|>",
        "{{ 1 }}",
        "{% for %}",
        "{{ messages }}",
    ),
    *("\u27e6x\u27e7", "assistant", "<script>alert(1)</script>", "' OR 1=1", "[bold]x[/bold]", "[/]", "%s %d {0}"),
    *("x" * 5000, "x" * 100_000, " leading", "trailing ", "\r\n", "a\rb", "null", "NaN", "-", "!!!", "0", "हिन्दी"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, float("nan"), float("inf"), 10**400, -(10**30)),
    *([], {}, [1], ["a"], {"a": 1}, {"content": "x"}, {"type": "text", "text": "x"}, [[]], [None], *TEXTS),
]
ROLES: list[Any] = [
    *("user", "assistant", "system", "tool", "function", "User", "ASSISTANT", "human", "gpt", "", None, 1),
    *("assistant ", "<|im_end|>", "developer", "ipython", [], {}),
]
KEYS = [
    *("x", "tool_calls", "Prompt", "text", "name", "reasoning", "", "messages", "prompt", "completion", "\ud800"),
    *("a\nb", "__class__", "weight", "conversations", "from", "value", "id", "instruction", "output"),
]
IDS: list[Any] = ["7", 7, "same", None, "", 1.0, True, [1], {"a": 1}, "\ud800", "a\nb", "\x1b[31m", "x" * 3000, 10**400]
Place = tuple[Any, Any]
"""A list or mapping, and the index or key of a value in it."""


def rarely(draw: st.DrawFn, one_in: int) -> bool:
    """True once in so many draws; the ends of a list are drawn more often than its middle."""
    return draw(st.sampled_from([index == one_in // 2 for index in range(one_in)]))


KINDS = ("pair", "chat", "alpaca", "sharegpt")
"""Formats of the rows of a file."""
_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


@st.composite
def plain_rows(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """A good row of a format."""
    number = draw(st.integers(0, 10**6))
    row: dict[str, Any]
    if kind == "pair":
        row = {"prompt": f"{number} plus?", "completion": draw(_ANSWERS)}
    elif kind == "alpaca":
        row = {
            "instruction": f"{number} plus?",
            "input": draw(st.sampled_from(["", "2", " "])),
            "output": draw(_ANSWERS),
        }
    else:
        turns = draw(_turns(number))
        named = [{"from": _NAMES[turn["role"]], "value": turn["content"]} for turn in turns]
        row = {"messages": turns} if kind == "chat" else {"conversations": named}
    return row | ({"id": draw(st.sampled_from(IDS))} if rarely(draw, 5) else {})


@st.composite
def _turns(draw: st.DrawFn, number: int) -> list[dict[str, Any]]:
    """A conversation of up to three questions."""
    turns = [{"role": "system", "content": "Be brief."}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": f"{number} {turn}?"})
        turns.append({"role": "assistant", "content": draw(_ANSWERS)})
    return turns


_WRITTEN = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
_ANSWERS = st.integers(0, 10**6).map(str) | st.integers(0, 10**6).map(str) | _WRITTEN | st.sampled_from(TEXTS)


@st.composite
def damaged_rows(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """A row with one value somewhere replaced, removed, added or moved."""
    row = copy.deepcopy(draw(plain_rows(kind)))
    container, key = draw(st.sampled_from(_places(row)))
    change = draw(st.integers(0, 6))
    if change <= 2:
        container[key] = draw(_values())
    elif change == 3:
        del container[key]
    elif change == 4 and isinstance(container, dict):
        container[draw(st.sampled_from(KEYS))] = draw(_values())
    elif change == 5 and isinstance(container, list):
        container.insert(draw(st.integers(0, len(container))), draw(_values()))
    elif isinstance(row.get("messages"), list):
        row["messages"] = draw(st.permutations(row["messages"]))
        turn = draw(st.sampled_from(row["messages"]))
        turn["role"] = draw(st.sampled_from(ROLES))
    return row


def _values() -> st.SearchStrategy[Any]:
    """Odd values, each a copy: a later change must not reach the list of them."""
    return st.sampled_from(VALUES).map(copy.deepcopy)


def _places(value: Any) -> list[Place]:
    """Every place in nested lists and mappings."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Two to eight rows of one format; in half of the tables one to three are damaged."""
    kind = draw(st.sampled_from(KINDS))
    rows = draw(st.lists(plain_rows(kind), min_size=2, max_size=8))
    for _ in range(draw(st.integers(1, 3)) if draw(st.booleans()) else 0):
        rows[draw(st.integers(0, len(rows) - 1))] = draw(damaged_rows(kind))
    return rows
