"""A JSON schema checker for the words that the recipe schema uses."""

import re
from typing import Any


def violations(value: Any, rule: dict[str, Any], root: dict[str, Any], where: str = "recipe") -> list[str]:
    """List what in a value violates a JSON schema."""
    handled = {"$ref", "$defs", "type", "properties", "required", "additionalProperties", "items", "anyOf", "oneOf"}
    handled |= {"enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "minItems"}
    handled |= {"pattern", "discriminator", "title", "description", "default", "examples"}
    assert set(rule) <= handled, set(rule) - handled
    if "$ref" in rule:
        return violations(value, root["$defs"][rule["$ref"].rsplit("/", 1)[1]], root, where)
    for union in ("anyOf", "oneOf"):
        if union in rule:
            tried = [violations(value, option, root, where) for option in rule[union]]
            return [] if [] in tried else [f"{where}: fits none of {len(tried)}: {tried}"]
    kinds: dict[str, type | tuple[type, ...]] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "boolean": bool,
        "null": type(None),
    }
    kinds["number"] = (int, float)
    if "type" in rule and (
        not isinstance(value, kinds[rule["type"]]) or (isinstance(value, bool) != (rule["type"] == "boolean"))
    ):
        return [f"{where}: {value!r} is no {rule['type']}"]
    wrong = [
        "enum" in rule and value not in rule["enum"],
        "const" in rule and value != rule["const"],
        "minimum" in rule and value < rule["minimum"],
        "maximum" in rule and value > rule["maximum"],
        "exclusiveMinimum" in rule and value <= rule["exclusiveMinimum"],
        "exclusiveMaximum" in rule and value >= rule["exclusiveMaximum"],
        "minLength" in rule and len(value) < rule["minLength"],
        "minItems" in rule and len(value) < rule["minItems"],
        "pattern" in rule and not re.search(rule["pattern"], value),
    ]
    errors = [f"{where}: {value!r} breaks {rule}"] if any(wrong) else []
    if isinstance(value, dict):
        errors += [f"{where}: {key} is missing" for key in rule.get("required", []) if key not in value]
        others = rule["additionalProperties"]
        for key, inner in value.items():
            known = rule.get("properties", {}).get(key, others)
            errors += violations(inner, known, root, f"{where}.{key}") if known else [f"{where}: {key} is unknown"]
    if isinstance(value, list):
        errors += [text for item in value for text in violations(item, rule["items"], root, where)]
    return errors
