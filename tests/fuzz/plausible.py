"""Recipes with values that the schema allows, most of which are accepted: none of them may be ignored."""

import copy
from typing import Any

from hypothesis import strategies as st

from llmtune.recipe import schema

Rule = dict[str, Any]
Strategy = st.SearchStrategy[Any]

_SCHEMA = schema()
_NAMES = ["q_proj", "v_proj", "down_proj", "layers.1.mlp.up_proj", "absent"]
_FREE: dict[str, Strategy] = {
    "Model.base": st.just("base"),
    "Model.revision": st.sampled_from(["main", "1234567", "v1.0"]),
    **{f"Data.{part}": st.just("rows.jsonl") for part in ("train", "eval", "test")},
    "Eval.suite": st.sampled_from(["quick", "none"]),
    "Launch.accelerate": st.sampled_from(["auto", "cpu"]),
    "Launch.processes": st.just(1),
    "Publish.repo": st.just("me/x"),
}
"""Values for keys whose rule allows any text, or more than this machine has."""


def _values(rule: Rule, name: str = "") -> Strategy:
    """Values of a schema's rule; `name` is section and key."""
    if name in _FREE:
        return _FREE[name]
    if "$ref" in rule:
        return _section(rule["$ref"].rsplit("/", 1)[-1])
    for choice in ("anyOf", "oneOf"):
        if choice in rule:
            return st.one_of([_values(option, name) for option in rule[choice]])
    if "const" in rule or "enum" in rule:
        return st.sampled_from(rule.get("enum", [rule.get("const")]))
    if "properties" in rule:
        return _keys(rule, name)
    return _TYPES[rule.get("type", "null")](rule)


def _integers(rule: Rule) -> Strategy:
    low = int(rule.get("minimum", 0))
    return st.sampled_from([low, low + 1, low + 2, low + 16, low + 1000, low + (1 << 31), 10**18 - 1])


def _numbers(rule: Rule) -> Strategy:
    low, high = rule.get("minimum", rule.get("exclusiveMinimum")), rule.get("maximum", rule.get("exclusiveMaximum"))
    bounds: Rule = {"exclude_min": "exclusiveMinimum" in rule, "exclude_max": "exclusiveMaximum" in rule}
    bounds |= {"allow_nan": False, "allow_infinity": False}
    low, high = float(low or 0), float(high or 1e308)
    usual = [value for value in (1, 0.5, 0.1, 1e-4, 3e-5) if low <= value < high]
    return st.sampled_from(usual) | st.floats(low, high, **bounds)


def _lists(rule: Rule) -> Strategy:
    return st.lists(_values(rule["items"]), min_size=int(rule.get("minItems", 0)), max_size=3)


def _mappings(rule: Rule) -> Strategy:
    inner = rule["additionalProperties"]
    values = _values(inner) if isinstance(inner, dict) else st.sampled_from([1, "a", True])
    return st.dictionaries(st.sampled_from(_NAMES), values, max_size=2)


_TYPES: dict[str, Any] = {
    "integer": _integers,
    "number": _numbers,
    "string": lambda rule: st.sampled_from(_NAMES),
    "boolean": lambda rule: st.booleans(),
    "null": lambda rule: st.none(),
    "array": _lists,
    "object": _mappings,
}


def _section(name: str) -> Strategy:
    return _keys(_SCHEMA["$defs"][name], name)


@st.composite
def _keys(draw: st.DrawFn, rule: Rule, name: str) -> Rule:
    """A section with the keys that it must have, and up to three others."""
    keys, needed = rule["properties"], rule.get("required", [])
    others = sorted(set(keys) - set(needed))
    chosen = draw(st.lists(st.sampled_from(others), max_size=3, unique=True)) if others else []
    return {key: draw(_values(keys[key], f"{name}.{key}")) for key in [*needed, *chosen]}


@st.composite
def plausible(draw: st.DrawFn) -> Rule:
    """A recipe with all sections that it must have and up to three others."""
    keys, needed = _SCHEMA["properties"], _SCHEMA["required"]
    chosen = draw(st.lists(st.sampled_from(sorted(set(keys) - set(needed))), max_size=3, unique=True))
    recipe = {key: draw(_values(keys[key], key)) for key in [*needed, *chosen]}
    if isinstance(recipe["model"], dict):
        recipe["model"] |= {"base": "base"}
    return copy.deepcopy(recipe)
