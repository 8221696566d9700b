"""Recipes that nobody writes on purpose: odd values at every key, odd YAML, odd overrides, damaged text."""

import copy
import json
import math
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.fuzz.odd_yaml import ODD_FILES, ODD_OVERRIDES, ODD_VALUES, TOKENS
from tests.fuzz.plausible import plausible


@dataclass(frozen=True)
class Case:
    """A recipe file's bytes, and the overrides given with --set; its base is `base`, its rows are `rows.jsonl`."""

    content: bytes
    overrides: tuple[str, ...] = ()


LORA = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "v_proj"], "init": "pissa"}
METHODS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "full", "lr": 0.001},
    {"kind": "frozen", "reach": 2},
    {"kind": "frozen", "reach": 0.5, "bottom_ratio": 0.5},
    {"kind": "gradual", "reaches": [1, 2, "all"]},
    {"kind": "gradual", "reaches": [0, "all"], "until": [0.5, 1], "lr": [0.001, 0.002]},
    {"kind": "discriminative", "decay": 0.9},
    {"kind": "lisa", "blocks": 1, "every": 2},
    {"kind": "staged", "stages": [{"until": 0.5, "reach": 1}, {"until": 1, "reach": "all", "decay": 0.5}]},
    {"kind": "full", "adapter": {**LORA, "layers": "top", "ranks": {"q_proj": 2}, "alphas": {"v_proj": 4}}},
    {"kind": "full", "adapter": {"kind": "lora", "dora": True}},
    {"kind": "full", "adapter": {"kind": "vera"}},
    {"kind": "frozen", "reach": 1, "adapter": {"kind": "ia3"}},
    {"kind": "full", "adapter": {"kind": "bottleneck", "size": 4, "form": "parallel"}},
]
EVERYTHING: dict[str, Any] = {
    "model": {"base": "base", "precision": "fp32", "revision": "main", "quantize": "none"},
    "data": {
        "train": "rows.jsonl",
        "test": "rows.jsonl",
        "eval": "rows.jsonl",
        "max_length": 64,
        "overlength": "drop",
        "overlap": "warn",
    },
    "method": {"kind": "full"},
    "train": {
        "epochs": 3,
        "batch_size": 4,
        "max_steps": 12,
        "micro_batch_size": 2,
        "micro_batch_tokens": 512,
        "warmup": 0.1,
        "schedule": "linear",
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "group_by_length": False,
        "seed": 1,
        "activation_checkpointing": False,
        "save_every": 0.5,
        "keep": 1,
    },
    "memory": {"frozen_blocks": "auto", "cache_limit_gb": 1},
    "launch": {"accelerate": "cpu", "processes": 1},
    "eval": {"suite": "quick", "limit": 3, "shots": 1},
    "merge": {"enabled": True, "dtype": "float32"},
    "publish": {"repo": "me/x", "visibility": "private", "weights": "delta"},
}


def _seed(method: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"base": "base", "precision": "fp32"},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.2},
        "method": method,
        "train": {"epochs": 3, "batch_size": 4},
        "eval": {"suite": "quick"},
    }


SEEDS = [*map(_seed, METHODS), EVERYTHING]
"""Recipes that are accepted as they stand."""
SHORT_METHODS: list[Any] = [
    *("full", "lora", "qlora", "dora", "gradual", "vera"),
    {"adapter": "lora"},
    {"adapter": {"kind": "dora", "rank": 4}, "lr": 0.001},
    {"kind": "lora", "rank": 4, "targets": ["q_proj"], "lr": 0.001},
    {"kind": "gradual", "adapter": "pissa"},
    {"kind": "qlora", "alpha": 8},
]
_SHORT = [
    {**_seed({}), "method": method, "memory": {"prefix": "keep", "prefix_limit_gb": 1}} for method in SHORT_METHODS
]
Key = tuple[str | int, ...]


def _keys(value: Any, key: Key = ()) -> list[Key]:
    """Every key of nested sections and lists, those of sections themselves included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [inner for name, part in items for inner in ((*key, name), *_keys(part, (*key, name)))]


_ABSENT = [
    "method.adapter.rslora",
    "method.bottom_ratio",
    "method.decay",
    "method.reach",
    "method.lr",
    "method.adapter",
]
_ABSENT += ["publish", "memory", "launch", "merge", "train.max_steps"]
PLACES = sorted({(key, index) for index, seed in enumerate(SEEDS) for key in _keys(seed)}, key=str)
PLACES += [(tuple(name.split(".")), 0) for name in _ABSENT]
_MARK = "a value goes here"


def place(seed: dict[str, Any], key: Key, text: str) -> str:
    """The recipe as YAML in flow style, in which any text may stand as the value at `key`."""
    recipe = copy.deepcopy(seed)
    container: Any = recipe
    for part in key[:-1]:
        container = container.setdefault(part, {}) if isinstance(container, dict) else container[part]
    container[key[-1]] = _MARK
    return json.dumps(recipe, indent=1).replace(f'"{_MARK}"', text)


def encode(text: str) -> bytes:
    """UTF-8, in which half of a surrogate pair stands as it is."""
    return text.encode("utf-8", "surrogatepass")


_GENERATED = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-2, 9) | st.floats(0, 2) | st.sampled_from(["all", "q_proj", ""]), max_size=4),
    st.dictionaries(st.sampled_from(["kind", "rank", "until", "q_proj", "("]), st.integers(0, 9) | st.text(max_size=5)),
).map(json.dumps)
VALUES = st.sampled_from(ODD_VALUES) | _GENERATED


@st.composite
def _in_file(draw: st.DrawFn) -> Case:
    key, index = draw(st.sampled_from(PLACES))
    return Case(encode(place(SEEDS[index], key, draw(VALUES))))


@st.composite
def _by_override(draw: st.DrawFn) -> Case:
    key, index = draw(st.sampled_from(PLACES))
    override = f"{'.'.join(map(str, key))}={draw(VALUES)}"
    return Case(encode(yaml.safe_dump(SEEDS[index], sort_keys=False)), (override,))


@st.composite
def _odd_override(draw: st.DrawFn) -> Case:
    seed = draw(st.sampled_from(SEEDS))
    overrides = draw(st.lists(st.sampled_from(ODD_OVERRIDES) | st.text(max_size=12), min_size=1, max_size=2))
    return Case(encode(yaml.safe_dump(seed, sort_keys=False)), tuple(overrides))


_ODD_KEYS = st.sampled_from(["kind", "x", "lr", "reach", "seed", "Base", "train ", "épochs", "learning_rate", "rank"])
_ODD_CONTENT: st.SearchStrategy[Any] = st.sampled_from([None, [], {}, 1, 0.5, "x", "all", True, -1, 1e308, 2**63])


@st.composite
def _restructured(draw: st.DrawFn) -> Case:
    """A recipe with keys removed, added and moved to other sections."""
    recipe = copy.deepcopy(draw(st.sampled_from(SEEDS) | st.sampled_from(_SHORT)))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(recipe)))
        section, change = recipe[name], draw(st.integers(0, 4))
        if isinstance(section, dict) and section and change == 0:
            section.pop(draw(st.sampled_from(sorted(section))))
        elif isinstance(section, dict) and change == 1:
            section[draw(_ODD_KEYS)] = copy.deepcopy(draw(_ODD_CONTENT))
        elif change == 2:
            recipe[name] = copy.deepcopy(draw(_ODD_CONTENT))
        elif change == 3:
            recipe[draw(st.sampled_from(["x", "modle", "trian", "Train", "train"]))] = section
        elif isinstance(section, dict):
            other = SEEDS[draw(st.integers(0, len(SEEDS) - 1))].get(name, {})
            recipe[name] = {**section, **copy.deepcopy(other)}
    text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=draw(st.sampled_from([None, True, False])))
    return Case(encode(text))


@st.composite
def _damaged(draw: st.DrawFn) -> Case:
    """A recipe whose text lost, gained or repeats a part."""
    text = yaml.safe_dump(draw(st.sampled_from(SEEDS)), sort_keys=False)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(1, 20)))
        change = draw(st.integers(0, 3))
        if change == 0:
            text = text[:start] + draw(st.sampled_from(TOKENS)) + text[start:]
        elif change == 1:
            text = text[:start] + text[end:]
        elif change == 2:
            text = text[:start] + draw(st.characters()) + text[start + 1 :]
        else:
            text = text[:end] + text[start:end] + text[end:]
    return Case(encode(text))


_PLAUSIBLE = plausible().map(lambda recipe: Case(encode(yaml.safe_dump(recipe, sort_keys=False))))
CASES: st.SearchStrategy[Case] = st.one_of(
    _in_file(),
    _by_override(),
    _odd_override(),
    _restructured(),
    _damaged(),
    st.sampled_from(ODD_FILES).map(Case),
    _PLAUSIBLE,
    _PLAUSIBLE,
)
"""Any recipe with any overrides."""


def first_difference(wanted: Any, got: Any, key: str = "") -> str | None:
    """Say which value that a user wrote the loaded recipe does not have, None where it has all of them."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        inner = (first_difference(part, got.get(str(name), "absent"), f"{key}.{name}") for name, part in wanted.items())
        return next(filter(None, inner), None)
    if isinstance(wanted, list) and isinstance(got, list | tuple) and len(wanted) == len(got):
        pairs = enumerate(zip(wanted, got, strict=True))
        return next(filter(None, (first_difference(*pair, f"{key}.{index}") for index, pair in pairs)), None)
    same_type = isinstance(wanted, bool) == isinstance(got, bool)
    both_nan = isinstance(wanted, float) and isinstance(got, float) and math.isnan(wanted) and math.isnan(got)
    return None if (wanted == got and same_type) or both_nan else f"{key[1:]}: {wanted!r} became {got!r}"
