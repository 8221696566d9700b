"""Recipes with their shorthands written out, in few lines of another hand than llmtune's."""

from typing import Any

_METHODS = ("full", "frozen", "gradual", "discriminative", "staged", "lisa")
_ADAPTERS = ("lora", "ia3", "bottleneck", "vera", "none")
_LORA: dict[str, dict[str, Any]] = {
    "qlora": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "pissa": {"init": "pissa"},
}
_LORA["olora"] = {"init": "olora"}
_OLD = {"prefix": "frozen_blocks", "prefix_limit_gb": "cache_limit_gb"}


def written_out(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without short words: what a user wrote, at the keys where it ends up."""
    method = recipe.get("method")
    if isinstance(method, str):
        method = {"kind": method}
    method = dict(method or {})
    kind = method.get("kind", "full")
    if kind in (*_ADAPTERS, *_LORA):
        inner = method.pop("adapter", None)
        own = {key: method.pop(key) for key in list(method) if key not in ("kind", "lr")}
        method["adapter"] = {**(inner if isinstance(inner, dict) else {}), **own, "kind": kind}
        kind = "full"
    method["kind"] = kind
    words = []
    if "adapter" in method:
        adapter = method["adapter"]
        adapter = {"kind": "none"} if adapter is None else adapter
        adapter = {"kind": adapter} if isinstance(adapter, str) else dict(adapter)
        words.append(adapter["kind"])
        if adapter["kind"] in _LORA:
            adapter |= {**_LORA[adapter["kind"]], "kind": "lora"}
        method["adapter"] = adapter
    model = dict(recipe["model"])
    if "qlora" in words:
        model.setdefault("quantize", "4bit")
    memory = {"memory": _memory(recipe["memory"])} if isinstance(recipe.get("memory"), dict) else {}
    return {**recipe, "model": model, "method": method, **memory}


def _memory(section: dict[str, Any]) -> dict[str, Any]:
    renamed = {_OLD.get(key, key): value for key, value in section.items()}
    if "prefix" in section:
        renamed["frozen_blocks"] = {"keep": "cache", "none": "recompute"}.get(section["prefix"], section["prefix"])
    return renamed
