"""YAML with line numbers: safe, no duplicate keys, no aliases, no tags, at most 1 MiB."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmtune.errors import RecipeError

LIMIT_BYTES = 1 << 20
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Located:
    """Plain values of a YAML file and the line (1-based) of every key path."""

    path: Path
    value: Any
    lines: dict[Key, int] = field(default_factory=dict)

    def error(self, key: Key, message: str) -> RecipeError:
        """A one-line error that names file, line and key."""
        known = next((self.lines[key[:size]] for size in range(len(key), -1, -1) if key[:size] in self.lines), 1)
        dotted = ".".join(str(part) for part in key)
        return RecipeError(f"{self.path}:{known}: {dotted + ': ' if dotted else ''}{message}")


def load_yaml(path: Path) -> Located:
    """The mapping in a YAML file; raises RecipeError with file and line for anything else."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= LIMIT_BYTES and path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}") from error
    if text is None:
        reason = f"{size} bytes are more than a recipe may have ({LIMIT_BYTES})" if path.is_file() else "is no file"
        raise RecipeError(f"{path}: {reason}")
    located = Located(path, None)
    try:
        _refuse_aliases(located, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = _plain(located, node, ()) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{path}:{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds a {type(value).__name__}"
        raise RecipeError(f"{path}:1: {found}; a mapping of sections (model, data, method, ...) is expected")
    return Located(path, value, located.lines)


def _refuse_aliases(located: Located, text: str) -> None:
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) and event.start_mark:
            raise RecipeError(
                f"{located.path}:{event.start_mark.line + 1}: aliases (*{event.anchor}) are not allowed; write the value out"
            )


def _plain(located: Located, node: yaml.Node, key: Key) -> Any:
    """The value of a node; records the line of every key on the way."""
    located.lines[key] = node.start_mark.line + 1
    if not node.tag.startswith("tag:yaml.org,2002:") or ":python" in node.tag:
        raise located.error(key, f"the tag {node.tag!r} is not allowed; a recipe is plain data")
    if isinstance(node, yaml.MappingNode):
        return _mapping(located, node, key)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(located, item, (*key, index)) for index, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except ValueError as error:
        raise located.error(key, f"not a valid value: {error}") from error


def _mapping(located: Located, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name_node, value_node in node.value:
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else str(name_node.value)
        if name in found:
            first = located.lines[(*key, name)]
            located.lines[(*key, name)] = name_node.start_mark.line + 1
            raise located.error((*key, name), f"duplicate key, first given on line {first}")
        found[name] = _plain(located, value_node, (*key, name))
        located.lines[(*key, name)] = name_node.start_mark.line + 1
    return found
