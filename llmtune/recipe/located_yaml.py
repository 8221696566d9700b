"""Safe YAML that remembers the line of every key: of bounded size, without duplicate keys, aliases or tags."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmtune.errors import RecipeError, nearest, one_line

LONGEST_PLACE = 160
"""Characters of an override in a message."""
LIMIT_BYTES = 1 << 20
LIMIT_DEPTH = 32
LIMIT_VALUES = 10_000
LIMIT_NUMBER = 10**18 - 1
Key = tuple[str | int, ...]

_CORE = "tag:yaml.org,2002:"
_SCALARS_AND_CONTAINERS = ("map", "seq", "str", "int", "float", "bool", "null")
_CONTAINERS = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}
_READ_AS_TEXT = ("timestamp", "merge", "value")
"""What keys may look like beside plain values: a key such as 2024-01-01, << or = is told to be unknown."""
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_DATA = (".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files of rows."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""NUL, which no path may have, and halves of surrogate pairs, which no file may have."""


@dataclass(frozen=True)
class Located:
    """The values of a YAML file, and for every key path its place: file:line, or the override that set it."""

    path: Path
    value: Any
    places: dict[Key, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a command tells of how the values were read."""

    def error(self, key: Key, message: str) -> RecipeError:
        """Make a one-line error that names the place and the key."""
        prefixes = (key[:size] for size in range(len(key), -1, -1))
        file = f"{self.path}:1" if self.places else str(self.path)
        place = next((self.places[prefix] for prefix in prefixes if prefix in self.places), file)
        return RecipeError(f"{place}: {_dotted(key)}{message}")

    def override(self, text: str) -> None:
        """Set the value at a dotted key from `a.b=c`; raises RecipeError that names the override."""
        place = f"--set {one_line(text, LONGEST_PLACE)}"
        self.overrides.append(text)
        dotted, equals, value = text.partition("=")
        if not equals or not dotted:
            raise RecipeError(f"{place}: write it as section.key=value")
        *parents, last = dotted.split(".")
        container = self.value
        key: Key = ()
        for part in parents:
            container, key = self._enter(container, key, part, place)
        slot = self._slot(container, key, last, place)
        key = (*key, slot)
        for known in [known for known in self.places if known[: len(key)] == key]:
            del self.places[known]
        container[slot] = _Reader(lambda _line: place).read(value, key)
        self.places[key] = place

    def _enter(self, container: Any, key: Key, part: str, place: str) -> tuple[Any, Key]:
        """Return the section or list under `part`, and its key; an absent section is created."""
        slot = self._slot(container, key, part, place)
        if isinstance(container, dict) and container.get(part) is None:
            container[part] = {}
            self.places[(*key, slot)] = place
        return container[slot], (*key, slot)

    def _slot(self, container: object, key: Key, part: str, place: str) -> str | int:
        """Return the key or list index that `part` names in a container."""
        if isinstance(container, dict):
            return part
        name = ".".join(map(str, key))
        if not isinstance(container, list):
            raise RecipeError(f"{place}: {name} is {container!r}, not a section, so {part!r} cannot be set in it")
        if part.isdecimal() and len(part) < 10 and int(part) < len(container):  # int() raises over 4,300 digits
            return int(part)
        hint = f"try 0 to {len(container) - 1}" if container else "it is empty"
        raise RecipeError(f"{place}: {name} is a list and {part!r} is not an index of it; {hint}")


def load_yaml(path: Path) -> Located:
    """Read the mapping in a YAML file; raises RecipeError with file and line for anything else."""
    if path.suffix.lower() in _DATA and path.is_file():
        raise RecipeError(f"{path}: holds rows, not a recipe; write a recipe for them: llmtune init {path}")
    reader = _Reader(lambda line: f"{path}:{line}")
    value = reader.read(_read_text(path), ())
    if not isinstance(value, dict):
        content = "is empty" if value is None else f"holds {'a list' if isinstance(value, list) else 'a single value'}"
        raise RecipeError(f"{path}:1: {content}; a mapping of sections (model, data, method, ...) is expected")
    return Located(path, value, reader.places)


def load_yaml_list(path: Path, expected: str) -> Located:
    """Read the list in a YAML file; raises RecipeError with file and line for anything else, which names `expected`."""
    reader = _Reader(lambda line: f"{path}:{line}")
    value = reader.read(_read_text(path), ())
    if not isinstance(value, list):
        content = "is empty" if value is None else f"holds {'sections' if isinstance(value, dict) else 'a value'}"
        raise RecipeError(f"{path}:1: {content}; {expected} is expected")
    return Located(path, value, reader.places)


def _read_text(path: Path) -> str:
    """Read a small UTF-8 file; raises RecipeError."""
    if path.is_dir():
        recipe = path / "recipe.yaml"
        raise RecipeError(f"{path}: is a folder; give a file" + (f", such as {recipe}" if recipe.is_file() else ""))
    if not path.exists():
        beside = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such file{nearest(str(path), beside)}")
    if not path.is_file():
        raise RecipeError(f"{path}: is not a regular file")
    if path.stat().st_size > LIMIT_BYTES:
        raise RecipeError(f"{path}: has {path.stat().st_size} bytes; a recipe may have at most {LIMIT_BYTES}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}") from error


def _dotted(key: Key) -> str:
    return ".".join(map(str, key)) + ": " if key else ""


class _BoundedLoader(yaml.SafeLoader):
    """Raises RecipeError for aliases, and for what would exhaust the stack or minutes, before it goes on."""

    def __init__(self, text: str, place: Callable[[int], str]) -> None:
        super().__init__(text)
        self._place = place
        self._depth = self._values = 0

    def get_event(self) -> yaml.Event:
        """The next event, which is counted."""
        event: yaml.Event = super().get_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1 if event.start_mark else 1
        self._depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        self._values += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"{self._place(line)}: aliases (*{event.anchor}) are not allowed; write the value out")
        if self._depth > LIMIT_DEPTH:
            raise RecipeError(f"{self._place(line)}: nested more than {LIMIT_DEPTH} levels deep; no recipe is")
        if self._values > LIMIT_VALUES:
            raise RecipeError(f"{self._place(line)}: more than {LIMIT_VALUES:,} keys and values; no recipe has them")
        return event


@dataclass(frozen=True)
class _Reader:
    """Turns YAML text into values; `place` names a line, `places` collects the place of each key."""

    place: Callable[[int], str]
    places: dict[Key, str] = field(default_factory=dict)

    def read(self, text: str, key: Key) -> Any:
        """Parse the text of the value at `key`; raises RecipeError with its place."""
        try:
            node = _BoundedLoader(text, self.place).get_single_node()
            return None if node is None else self._value(node, key)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise RecipeError(f"{self.place(line)}: not YAML: {error.reason}") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = error.problem or error.context
            raise RecipeError(f"{self.place(mark.line + 1 if mark else 1)}: not YAML: {problem}") from error

    def _error(self, node: yaml.Node, key: Key, message: str) -> RecipeError:
        return RecipeError(f"{self.place(node.start_mark.line + 1)}: {_dotted(key)}{message}")

    def _value(self, node: yaml.Node, key: Key) -> Any:
        self.places.setdefault(key, self.place(node.start_mark.line + 1))
        tag = node.tag.removeprefix(_CORE)
        if tag == "timestamp":
            raise self._error(node, key, f"{node.value} is a date in YAML; put it in quotes")
        if tag not in _SCALARS_AND_CONTAINERS or _CONTAINERS.get(tag, yaml.ScalarNode) is not type(node):
            raise self._error(node, key, f"the tag {node.tag!r} is not allowed; a recipe is plain data")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*key, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, key, tag)

    def _refuse_no_text(self, node: yaml.Node, key: Key) -> None:
        character = _NO_TEXT.search(node.value)
        if character:
            raise self._error(node, key, f"{node.value[:40]!r} holds {character[0]!r}, which no text may have")

    def _scalar(self, node: yaml.Node, key: Key, tag: str) -> Any:
        text = node.value
        self._refuse_no_text(node, key)
        if tag == "bool" and text.lower() not in ("true", "false"):
            boolean = str(text.lower() in ("on", "yes")).lower()
            raise self._error(node, key, f'{text} is {boolean} in YAML; write true or false, or "{text}" in quotes')
        if (tag == "int" and not _DECIMAL.fullmatch(text)) or (tag == "float" and ":" in text):
            raise self._error(node, key, f"{text} is not a plain decimal number; write one, or put the text in quotes")
        try:
            value = yaml.constructor.SafeConstructor().construct_object(node)
        except ValueError as error:
            raise self._error(node, key, f"not a valid {tag}: {text[:40]!r}") from error
        if isinstance(value, int) and abs(value) > LIMIT_NUMBER:
            raise self._error(node, key, f"{text[:40]} is too large; a whole number has at most 18 digits")
        return value

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise self._error(name_node, key, "a key must be a single word")
            if name_node.tag.removeprefix(_CORE) not in (*_SCALARS_AND_CONTAINERS, *_READ_AS_TEXT):
                raise self._error(name_node, key, f"the tag {name_node.tag!r} is not allowed; a recipe is plain data")
            self._refuse_no_text(name_node, key)
            inner = (*key, name_node.value)
            if name_node.value in mapping:
                raise self._error(name_node, inner, f"duplicate key; it is also set at {self.places[inner]}")
            self.places[inner] = self.place(name_node.start_mark.line + 1)
            mapping[name_node.value] = self._value(value_node, inner)
        return mapping
