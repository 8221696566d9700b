"""Short ways to write a recipe, written out before validation: words for methods and adapters, old keys."""

from typing import Any

from llmtune.adapters.kinds import KINDS
from llmtune.methods.kinds import METHODS
from llmtune.recipe.located_yaml import Key, Located

WORDS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "qlora": {"kind": "lora"},
    "dora": {"kind": "lora", "dora": True},
    "rslora": {"kind": "lora", "rslora": True},
    "pissa": {"kind": "lora", "init": "pissa"},
    "olora": {"kind": "lora", "init": "olora"},
}
"""What a word means as `method.adapter`; but for none, as `method` too: the adapter under kind full."""
ALONE = [word for word in WORDS if word != "none"]
"""The adapters' words that may stand for a whole method."""
QUANTIZES = ("qlora",)
"""Words that also mean `model.quantize: 4bit`."""
_RENAMED = {
    "prefix": ("frozen_blocks", {"keep": "cache", "none": "recompute"}),
    "prefix_limit_gb": ("cache_limit_gb", {}),
}
"""Keys of `memory` in recipes of version 0.1: the key now, and the values that have another word."""


def expand(located: Located) -> None:
    """Write out what is short in a recipe's raw values, in place; raises RecipeError for a contradiction.

    What is no recipe at all is left to validation.
    """
    if not isinstance(located.value, dict):
        return
    _rename_old_keys(located)
    _expand_method(located)


def open_word(located: Located, override: str) -> None:
    """Turn `method: lora`, or an adapter's word, into a section where an override sets a key in it."""
    parts = override.partition("=")[0].split(".")
    if parts in (["method", "adapter"], ["method", "adapter", "kind"]):
        _open_adapter(located)
    section = located.value
    for depth in range(1, min(len(parts), 3)):
        name, key = parts[depth - 1], tuple(parts[:depth])
        word = section.get(name) if isinstance(section, dict) else None
        if name in ("method", "adapter") and isinstance(word, str) and word in words(key):
            section[name] = {"kind": word}
            located.places[*key, "kind"] = located.places[key]
        section = section.get(name) if isinstance(section, dict) else None


def _open_adapter(located: Located) -> None:
    """Turn a method that is an adapter's word into kind full with that adapter, which an override then replaces."""
    method = located.value.get("method") if isinstance(located.value, dict) else None
    if isinstance(method, str) and method in ALONE:
        located.value["method"] = {"kind": "full", "adapter": {"kind": method}}
        located.places["method", "adapter"] = located.places["method", "adapter", "kind"] = located.places["method",]
    elif isinstance(method, dict) and _is_word(method.get("kind")) and _agrees(method):
        located.value["method"] = _split(located, method)


def is_config_file(accelerate: object) -> bool:
    """Whether `launch.accelerate` names a file and not one of the shipped configs."""
    return isinstance(accelerate, str) and accelerate.endswith((".yaml", ".yml"))


def words(loc: tuple[int | str, ...]) -> list[str]:
    """The words that may stand for the section at a location."""
    return {"method": [*METHODS, *ALONE], "adapter": list(WORDS)}.get(str(loc[-1]) if loc else "", [])


def add_shorthands(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of recipes with the words that `expand` takes."""
    sections = schema["$defs"]
    adapters = [sections[KINDS[kind].__name__]["properties"] for kind in KINDS if kind != "none"]
    method, keys = _without(sections["Full"]["properties"], "kind"), _without(_merged(adapters), "kind")
    variants = _kind([word for word in ALONE if word not in KINDS])
    variant = {**_section({**sections["Lora"]["properties"], **variants}), "required": ["kind"]}
    for section in sections.values():
        options = section["properties"].get("adapter", {}).get("anyOf", [])
        if options:
            section["properties"]["adapter"]["anyOf"] = [*options, _words(ALONE), variant]
    adapter = {"anyOf": [_words(ALONE), _section(keys)]}
    schema["properties"]["method"] = {
        "anyOf": [
            schema["properties"]["method"],
            _words([*METHODS, *ALONE]),
            {**_section(method), "required": ["adapter"]},
            {**_section({**keys, **method, **_kind(ALONE), "adapter": adapter}), "required": ["kind"]},
        ]
    }
    return schema


def _section(keys: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": keys}


def _words(words: list[str]) -> dict[str, Any]:
    return {"type": "string", "enum": words}


def _kind(words: list[str]) -> dict[str, Any]:
    return {"kind": _words(words)}


def _without(keys: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: rule for key, rule in keys.items() if key != name}


def _merged(sections: list[dict[str, Any]]) -> dict[str, Any]:
    """The keys of several sections, each with what any of them allows."""
    names = list(dict.fromkeys(key for section in sections for key in section))
    rules = {key: [section[key] for section in sections if key in section] for key in names}
    return {key: some[0] if len(some) == 1 else {"anyOf": some} for key, some in rules.items()}


def _rename_old_keys(located: Located) -> None:
    memory = located.value.get("memory")
    if not isinstance(memory, dict):
        return
    for old, (new, values) in _RENAMED.items():
        if old not in memory:
            continue
        key = ("memory", old)
        if new in memory:
            raise located.error(key, f"is the old name of memory.{new}, which is set too; remove it")
        value = memory.pop(old)
        memory[new] = values.get(value, value) if isinstance(value, str) else value
        _move(located, key, ("memory", new))
        note = f"{located.places[('memory', new)]}: memory.{old} is read as memory.{new}: {memory[new]}"
        located.notes.append(f"{note}; write that from now on")


def _expand_method(located: Located) -> None:
    method = located.value.get("method")
    if isinstance(method, str) and method in METHODS:
        located.value["method"] = {"kind": method}
    elif isinstance(method, str) and method in ALONE:
        located.value["method"] = {"kind": "full", "adapter": method}
    elif isinstance(method, dict) and "adapter" in method and "kind" not in method:
        located.value["method"] = {"kind": "full", **method}
    elif isinstance(method, dict) and _is_word(method.get("kind")):
        located.value["method"] = _split(located, method) if _agrees(method) else _told_apart(located, method)
    method = located.value.get("method")
    if isinstance(method, dict) and "adapter" in method:
        _expand_adapter(located, method)


def _is_word(kind: object) -> bool:
    return isinstance(kind, str) and kind in ALONE


def _agrees(method: dict[str, Any]) -> bool:
    """Whether a method's own `adapter` section names no other kind than the method does."""
    adapter = method.get("adapter")
    if isinstance(adapter, dict):
        return adapter.get("kind") in (None, method["kind"])
    return adapter in (None, method["kind"])


def _told_apart(located: Located, method: dict[str, Any]) -> dict[str, Any]:
    """Raise RecipeError for two adapters; a method that holds the mistake alone where the second is none."""
    adapter = method["adapter"]
    word = adapter.get("kind") if isinstance(adapter, dict) else adapter
    if isinstance(word, str) and word in WORDS:
        message = f"{word} contradicts method.kind, which is {method['kind']}; write one of them"
        raise located.error(("method", "adapter"), message)
    return {"kind": "full", "adapter": adapter}


def _split(located: Located, method: dict[str, Any]) -> dict[str, Any]:
    """Turn `{kind: lora, rank: 8, lr: 1.0e-4}` into kind full with the adapter's own keys in its section."""
    spec, full = KINDS[WORDS[method["kind"]]["kind"]], METHODS["full"]
    own = [key for key in method if key in spec.model_fields and key not in full.model_fields]
    inner = method.get("adapter")
    section = inner if isinstance(inner, dict) else {}
    _choose(located, section, own)
    taken = [key for key in own if key not in section]
    adapter = {**section, "kind": method["kind"], **{key: method[key] for key in taken}}
    for key in (*taken, "kind"):
        _move(located, ("method", key), ("method", "adapter", key))
    rest = {key: value for key, value in method.items() if key not in own}
    return {**rest, "kind": "full", "adapter": adapter}


def _choose(located: Located, section: dict[str, Any], own: list[str]) -> None:
    """Keep the later override of a key that stands both in `method` and in its adapter's section.

    Raises RecipeError where the file sets both.
    """
    for key in [key for key in own if key in section]:
        places = [located.places.get(at, "") for at in (("method", key), ("method", "adapter", key))]
        orders = [_order(located, place) for place in places]
        if orders[0] == orders[1]:
            raise located.error(("method", key), f"is set in method.adapter.{key} too; remove one of them")
        if orders[0] > orders[1]:
            del section[key]


def _order(located: Located, place: str) -> int:
    """The number of the override that set a value, from 1; 0 for the file."""
    override = place.removeprefix("--set ")
    return located.overrides.index(override) + 1 if override in located.overrides else 0


def _expand_adapter(located: Located, method: dict[str, Any]) -> None:
    adapter = method["adapter"]
    word = adapter.get("kind") if isinstance(adapter, dict) else adapter
    if not isinstance(word, str) or word not in WORDS:
        return
    written = adapter if isinstance(adapter, dict) else {}
    for key, value in WORDS[word].items():
        if key != "kind" and written.get(key, value) != value:
            raise located.error(
                ("method", "adapter", key), f"{str(written[key]).lower()} contradicts {word}; try kind: lora"
            )
    method["adapter"] = {**written, **WORDS[word]}
    model = located.value.get("model")
    if word in QUANTIZES and isinstance(model, dict) and model.setdefault("quantize", "4bit") == "none":
        message = f"none contradicts {word}, which is LoRA over a 4-bit base; write 4bit, or lora in place of {word}"
        raise located.error(("model", "quantize"), message)


def _move(located: Located, old: Key, new: Key) -> None:
    """Give the places of a key, and of what it holds, to another key."""
    for key in [key for key in located.places if key[: len(old)] == old]:
        located.places[new + key[len(old) :]] = located.places.pop(key)
