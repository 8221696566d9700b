"""docs/recipes.md from the recipe's JSON schema: one table a section. Run: python -m tests.support.reference"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.recipe.sections import schema
from tests.support import ROOT

DOCUMENT = ROOT / "docs" / "recipes.md"
INTRODUCTION = """# Recipe reference

`make reference` writes this page from the recipe's schema; edit the text under a field in the code instead.

A recipe is one YAML file. It needs `model`, `data` and `method`; each other section has defaults.
`llmtune schema` prints the same schema as JSON. Editors complete keys with it: name it in the first line, as the
recipes in [recipes/](../recipes) do. `--set section.key=value` overrides one value on the command line.

`method` and `method.adapter` may be one word: `method: lora` means `method: {kind: full, adapter: {kind: lora}}`, and
`dora`, `rslora`, `pissa`, `olora` are LoRA with that switch. `qlora` is LoRA with `model.quantize: 4bit`. An adapter's
keys may stand beside its word: `method: {kind: lora, rank: 8}`. A run's `recipe.yaml` shows everything written out.

An unknown key, a wrong type or an impossible value ends `llmtune check` with one line, before anything loads.

In the tables, *required* means that the key has no default. *Not set* means that llmtune chooses, as the text says.
Distances count from the output: 0 is the head and the final norm, 1 the last block.
[methods.md](methods.md) says which method to choose and lists the default learning rates.
"""
_COMPARISONS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}


def page(root: dict[str, Any]) -> str:
    """The Markdown of the reference: an introduction, then a heading and a table for each section of the schema."""
    parts = [INTRODUCTION]
    for name, rule in root["properties"].items():
        parts += _sections(root, name, rule, set())
    return "\n".join(parts)


def _sections(root: dict[str, Any], path: str, rule: dict[str, Any], seen: set[str]) -> Iterator[str]:
    """Heading and table of each section that a rule allows, then those of the sections inside it."""
    names = [name for name in _references(rule) if f"{path} {name}" not in seen]
    for name in names:
        seen.add(f"{path} {name}")
        section = root["$defs"][name]
        yield f"## `{path}`{_kind(section)}\n\n{section['description']}\n\n{_table(section)}\n"
    for name in names:
        for key, inner in root["$defs"][name]["properties"].items():
            yield from _sections(root, f"{path}.{key}", inner, seen)


def _references(rule: dict[str, Any]) -> list[str]:
    """The names of the sections that a value may be, in the schema's order."""
    if "$ref" in rule:
        return [rule["$ref"].rsplit("/", 1)[1]]
    options = [*rule.get("anyOf", []), *rule.get("oneOf", [])]
    inside = [rule["items"]] if "items" in rule else []
    return [name for option in [*options, *inside] for name in _references(option)]


def _kind(section: dict[str, Any]) -> str:
    kind = section["properties"].get("kind", {}).get("const")
    return f", kind `{kind}`" if kind else ""


def _table(section: dict[str, Any]) -> str:
    """The rows of a section: key, values, default, meaning; a key that tells kinds apart shows its one value."""
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for key, rule in section["properties"].items():
        default = "required" if key in required else _default(rule.get("default"))
        cells = [f"`{key}`", _values(rule), default, " ".join(rule.get("description", "").split())]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _values(rule: dict[str, Any]) -> str:
    """The values that a rule allows, in words."""
    options = [*rule.get("anyOf", []), *rule.get("oneOf", [])]
    if options:
        inherited = {"examples": rule["examples"]} if "examples" in rule else {}
        texts = [_values({**inherited, **option}) for option in options if option.get("type") != "null"]
        return ", or ".join(dict.fromkeys(texts))
    if "$ref" in rule or "properties" in rule:
        return "a section"
    if "const" in rule or "enum" in rule:
        return ", ".join(f"`{word}`" for word in rule.get("enum", [rule.get("const")]))
    if rule["type"] == "array":
        return "a list of sections" if _references(rule) else f"a list: {_values(rule['items'])}"
    if rule["type"] == "object":
        inner = rule["additionalProperties"]
        return f"names and values: {_values(inner) if isinstance(inner, dict) else 'any'}"
    if "pattern" in rule:
        return f"text such as `{rule['examples'][0]}`"
    bounds = [f"{sign} {rule[word]:g}" for word, sign in _COMPARISONS.items() if word in rule]
    return " ".join([_TYPES[rule["type"]], *bounds])


def _default(value: Any) -> str:
    """A default as a recipe writes it."""
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return f"`kind: {value['kind']}`" if "kind" in value else "`{}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def main(document: Path = DOCUMENT) -> None:
    """Write the page."""
    document.write_text(page(schema()), encoding="utf-8")


if __name__ == "__main__":
    main()
