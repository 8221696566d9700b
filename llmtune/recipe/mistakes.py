"""Validation errors of a recipe as one line: place, key, what is expected and the nearest valid word."""

import difflib
import math
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llmtune.errors import RecipeError, nearest
from llmtune.recipe import other_tools, shorthand
from llmtune.recipe.located_yaml import Key, Located

Loc = tuple[int | str, ...]

_NUMBER = re.compile(r"([-+]?)(\d+\.?\d*|\.\d+)([eE]([-+]?)(\d+))?")
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text",
    "tuple_type": "a list",
    "greater_than": "a number > {gt:.12g}",
    "greater_than_equal": "a number >= {ge:.12g}",
    "less_than": "a number < {lt:.12g}",
    "less_than_equal": "a number <= {le:.12g}",
    "too_short": "a list of at least {min_length}",
}
_NOT_A_SECTION = ("model_type", "model_attributes_type", "dict_type")


def explain(located: Located, schema: type[BaseModel], error: ValidationError) -> RecipeError:
    """Choose one error to report: an unknown key if there is one, else the deepest error at the first key."""
    pairs = [(_key(located, details), details) for details in error.errors()]
    unknown = [pair for pair in pairs if pair[1]["type"] == "extra_forbidden"]
    if unknown:
        key, details = unknown[0]
        others = other_tools.also([str(other["loc"][-1]) for _, other in unknown[1:]])
        return located.error(key, _unknown(schema, details["loc"]) + others)
    within = [pair for pair in pairs if pair[0][: len(pairs[0][0])] == pairs[0][0]]
    key = max((key for key, _ in within), key=len)
    return located.error(key, _message(schema, [details for other, details in within if other == key]))


def _key(located: Located, details: ErrorDetails) -> Key:
    """Return the recipe key of an error: its location without the union tags that pydantic puts between keys."""
    key: list[str | int] = []
    value = located.value
    loc = details["loc"]
    for position, part in enumerate(loc):
        in_list = isinstance(value, list) and isinstance(part, int)
        if in_list or (isinstance(value, dict) and part in value):
            key.append(part)
            value = value[part]
        elif position == len(loc) - 1 and isinstance(value, dict) and details["type"] == "missing":
            key.append(part)
    if details["type"] == "union_tag_invalid":
        key.append("kind")
    inner = getattr(details.get("ctx", {}).get("error"), "key", "")
    return (*key, *(int(part) if part.isdecimal() else part for part in inner.split(".") if part))


def _message(schema: type[BaseModel], group: list[ErrorDetails]) -> str:
    """Say what one key expects, over all members of a union that rejected the value, and what it got."""
    first = group[0]
    kind, value, loc = first["type"], first["input"], first["loc"]
    if kind == "missing":
        sections = [] if _may_be_text(schema, loc) else _sections(schema, loc)
        needed = [name for section in sections for name in _required(section)]
        return f"is missing; it needs {', '.join(dict.fromkeys(needed))}" if needed else "is missing and has no default"
    if kind == "union_tag_not_found":
        return f"needs a kind: {', '.join(_kinds(schema, loc))}"
    if kind == "union_tag_invalid":
        words = list(dict.fromkeys([*_kinds(schema, loc), *shorthand.words(loc)]))
        return (
            f"one of {', '.join(words)} is expected, got {_format(value['kind'])}{nearest(str(value['kind']), words)}"
        )
    if kind in _NOT_A_SECTION:
        return _section(schema, loc, value)
    contradiction = next((details for details in group if details["type"] == "value_error"), None)
    if contradiction:
        return str(contradiction["ctx"]["error"])
    return _expected(schema, group) + (_hint(value, group) or _default(schema, loc))


def _expected(schema: type[BaseModel], group: list[ErrorDetails]) -> str:
    phrases = []
    for details in group:
        kind, ctx = details["type"], details.get("ctx", {})
        if kind == "literal_error":
            words = _words(details)
            phrases.append(f"one of {', '.join(words)}" if len(words) > 1 else words[0])
        elif kind == "string_pattern_mismatch":
            phrases.append(f"text such as {_example(schema, details['loc'])}")
        elif kind in _EXPECTED:
            phrases.append(_EXPECTED[kind].format(**ctx))
        else:
            phrases.append(details["msg"])
    unique = [phrase for phrase in dict.fromkeys(phrases) if phrase != "a whole number" or "a number" not in phrases]
    return f"{' or '.join(unique)} is expected, got {_format(group[0]['input'])}"


def _hint(value: object, group: list[ErrorDetails]) -> str:
    """Say how to write the number that a text looks like, or name the nearest valid word."""
    if not isinstance(value, str):
        return "; put it in quotes" if group[0]["type"] == "string_type" and isinstance(value, int | float) else ""
    number = _NUMBER.fullmatch(value.strip())
    if number and any(details["type"] in ("int_type", "float_type") for details in group):
        sign, digits, exponent, exponent_sign, power = number.groups()
        if not exponent:
            return "; write it without quotes"
        digits = digits if "." in digits else f"{digits}.0"
        return f", which is text in YAML; write {sign}{digits}e{exponent_sign or '+'}{power}"
    return nearest(value, [word for details in group if details["type"] == "literal_error" for word in _words(details)])


def _section(schema: type[BaseModel], loc: Loc, value: object) -> str:
    """Say which section a key expects in place of a single value or a list."""
    kinds, words = _kinds(schema, loc), shorthand.words(loc)
    if isinstance(value, str) and words:
        return f"one of {', '.join(words)}, or a section, is expected, got {_format(value)}{nearest(value, words)}"
    if isinstance(value, str) and kinds:
        near = difflib.get_close_matches(value, kinds, n=1, cutoff=0.5)
        return f"a section is expected, got {value!r}; write {{kind: {near[0] if near else '|'.join(kinds)}}}"
    sections = _sections(schema, loc)
    needed = [name for section in sections for name in _required(section)]
    if isinstance(value, str) and 1 <= len(needed) <= 2:
        others = "".join(f", {name}: ..." for name in needed[1:])
        return f"a section is expected, got {value[:80]!r}; write {{{needed[0]}: {value[:80]}{others}}}"
    keys = list(dict.fromkeys(name for section in sections for name in section.model_fields))
    expected = f"a section with keys such as {', '.join(keys[:3])}" if keys else "a mapping"
    return f"{expected} is expected, got {_format(value)}"


def _unknown(schema: type[BaseModel], loc: Loc) -> str:
    """Say where an unknown key belongs: another section, another kind of this one, or a key of nearly that name."""
    name = str(loc[-1])
    here = _sections(schema, loc[:-1])
    known = sorted({field for section in here for field in section.model_fields})
    union = _sections(schema, loc[:-2]) if loc[:-1] and not _fields(schema, loc[:-1]) else []
    kinds = [kind for section in union if name in section.model_fields for kind in _tags(section)]
    if kinds:
        return f"unknown key for kind {loc[-2]}; {' and '.join(kinds)} {'has' if len(kinds) == 1 else 'have'} it"
    elsewhere = other_tools.answer(name)
    if elsewhere:
        return elsewhere
    if hint := nearest(name, known, 0.6):
        return f"unknown key{hint}"
    everywhere = {} if any(isinstance(part, int) for part in loc) else _everywhere(schema)
    close = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.8)
    if close:
        return f"unknown key here; did you mean {everywhere[close[0]]}?"
    return f"unknown key; known here: {', '.join(known)}"


def _options(annotation: object) -> list[type[BaseModel]]:
    """List the sections among the members of an annotation, however nested."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [option for member in get_args(annotation) for option in _options(member)]


def _sections(schema: type[BaseModel], loc: Loc) -> list[type[BaseModel]]:
    """List the sections that a location, with its union tags and list indices, can mean."""
    options = [schema]
    for part in loc:
        fields = [option.model_fields[part] for option in options if part in option.model_fields]
        tagged = [option for option in options if part in _tags(option)]
        options = (
            [section for field in fields for section in _options(field.annotation)] if fields else tagged or options
        )
    return options


def _tags(section: type[BaseModel]) -> tuple[str, ...]:
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _kinds(schema: type[BaseModel], loc: Loc) -> list[str]:
    return [kind for section in _sections(schema, loc) for kind in _tags(section)]


def _required(section: type[BaseModel]) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required()]


def _may_be_text(schema: type[BaseModel], loc: Loc) -> bool:
    """Whether the value at a location may be a text, too."""
    members = (member for field in _fields(schema, loc) for member in get_args(field.annotation))
    return any(str in (member, *get_args(member)[:1]) for member in members)


def _everywhere(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Map every key of the schema to its dotted path, the shallowest one where several sections have the key."""
    paths = {key: prefix + key for key in schema.model_fields}
    for key, field in schema.model_fields.items():
        for section in _options(field.annotation):
            paths = _everywhere(section, f"{prefix}{key}.") | paths
    return paths


def _fields(schema: type[BaseModel], loc: Loc) -> list[FieldInfo]:
    """List the schema's fields for the key at a location, one for each section that it can mean."""
    sections = _sections(schema, loc[:-1])
    return [section.model_fields[name] for section in sections for name in section.model_fields if name == loc[-1]]


def _around(schema: type[BaseModel], loc: Loc) -> list[FieldInfo]:
    """The fields for the key of a location that may end in a place in a list and the tag of a union's member."""
    return _fields(schema, loc) or _fields(schema, loc[:-1]) or _fields(schema, loc[:-2])


def _example(schema: type[BaseModel], loc: Loc) -> str:
    return next(
        str(one) for field in _around(schema, loc) for one in (field.examples or _inner_examples(field.annotation))
    )


def _inner_examples(annotation: object) -> list[Any]:
    """Return the examples of the members of an annotation, such as the texts of a list."""
    own = annotation.examples if isinstance(annotation, FieldInfo) else None
    return own or [one for member in get_args(annotation) for one in _inner_examples(member)]


def _default(schema: type[BaseModel], loc: Loc) -> str:
    defaults = [field.default for field in _around(schema, loc) if isinstance(field.default, bool | int | float | str)]
    return f"; the default is {_format(defaults[0])}" if defaults else ""


def _words(details: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", details["ctx"]["expected"])


def _format(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list | tuple):
        return "a section" if isinstance(value, dict) else "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)[:60]
