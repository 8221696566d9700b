"""The short ways to write a recipe, written out a second time, to compare llmtune's way with."""

import os
from typing import Any

from tests.fuzz.outcome import BrokenRuleError

WORDS: dict[object, dict[str, Any]] = {
    None: {"kind": "none"},
    "none": {"kind": "none"},
    "lora": {"kind": "lora"},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera"},
    "bottleneck": {"kind": "bottleneck"},
    "qlora": {"kind": "lora"},
    "dora": {"kind": "lora", "dora": True},
    "rslora": {"kind": "lora", "rslora": True},
    "pissa": {"kind": "lora", "init": "pissa"},
    "olora": {"kind": "lora", "init": "olora"},
}
"""What a word means as an adapter."""
_METHODS = ("full", "frozen", "gradual", "discriminative", "staged", "lisa")
_RENAMED = {"prefix": "frozen_blocks", "prefix_limit_gb": "cache_limit_gb"}
_FROZEN_BLOCKS = {"keep": "cache", "none": "recompute"}
_PATHS = {"model": ("base",), "data": ("train", "eval", "test"), "eval": ("suite",), "launch": ("accelerate",)}


class SamePath(str):
    """A path that equals every other way to write it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and (str.__eq__(self, other) or _absolute(self) == _absolute(other))

    __hash__ = str.__hash__


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def write_out(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe that a short one stands for."""
    written = {**recipe, "method": _method(recipe["method"])}
    word = _adapter_word(recipe["method"])
    if word == "qlora":
        written["model"] = {**recipe["model"], "quantize": "4bit"}
    if isinstance(recipe.get("memory"), dict):
        written["memory"] = dict(_memory(*item) for item in recipe["memory"].items())
    return written


def _method(method: Any) -> dict[str, Any]:
    if isinstance(method, str):
        return {"kind": method} if method in _METHODS else {"kind": "full", "adapter": dict(WORDS[method])}
    kind = method.get("kind", "full")
    if kind not in _METHODS:
        own = {key: value for key, value in method.items() if key not in ("kind", "lr", "adapter")}
        adapter = _adapter(_join(_section(method.get("adapter", kind)), own, {"kind": kind}))
        return {"kind": "full", "adapter": adapter} | ({"lr": method["lr"]} if "lr" in method else {})
    return {**method, "kind": kind} | ({"adapter": _adapter(method["adapter"])} if "adapter" in method else {})


def _adapter(adapter: Any) -> dict[str, Any]:
    written = _section(adapter)
    rest = {key: value for key, value in written.items() if key != "kind"}
    return _join(rest, WORDS[written["kind"]])


def _section(adapter: Any) -> dict[str, Any]:
    return adapter if isinstance(adapter, dict) else {"kind": adapter}


def _join(*sections: dict[str, Any]) -> dict[str, Any]:
    """One section of several; raises where they give a key two values, one of which would be ignored."""
    joined: dict[str, Any] = {}
    for section in sections:
        for key, value in section.items():
            if joined.setdefault(key, value) != value:
                raise BrokenRuleError(f"accepted two values for {key}: {joined[key]!r} and {value!r}")
    return joined


def _adapter_word(method: Any) -> Any:
    """The word that names the adapter of a method, wherever it stands."""
    if isinstance(method, dict):
        adapter = method.get("adapter")
        word = adapter.get("kind") if isinstance(adapter, dict) else adapter
        return word if word is not None else method.get("kind")
    return method


def _memory(key: str, value: Any) -> tuple[str, Any]:
    return _RENAMED.get(key, key), _FROZEN_BLOCKS.get(value, value) if key == "prefix" else value


def with_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A loaded recipe's values, where each path equals every way to write it."""
    changed = {name: dict(section) if name in _PATHS else section for name, section in values.items()}
    for name, keys in _PATHS.items():
        for key in keys:
            if isinstance(changed[name][key], str):
                changed[name][key] = SamePath(changed[name][key])
    return changed
