"""Reads rows from any source, recognises their format by their columns, and checks each of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from llmtune.data.formats.base import Content, Format, Record
from llmtune.data.formats.columns import ColumnMap, hint, named_hint, suggest_map
from llmtune.data.formats.registry import NAMES, recognize
from llmtune.data.formats.values import describe, refuse_half_characters
from llmtune.data.row import Row
from llmtune.data.sources import Cursor, explained, records
from llmtune.errors import FieldError, RecipeError
from llmtune.recipe.data import Data

SPLITS = {"train": "train", "eval": "validation", "test": "test"}
"""The split of a data set that a part is read from where the recipe names none."""


@dataclass(frozen=True)
class Form:
    """In which form a source's records are rows."""

    format: str = "auto"
    map: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Data) -> "Form":
        """The form that a recipe's data section names; raises FieldError for a map of fields that no format has."""
        ColumnMap(data.map).check(data.format)
        return cls(data.format, data.map)


def read(source: str, default_split: str = "train", form: Form | None = None) -> list[Row]:
    """Read all rows of a source; raises RecipeError at the first bad one, and for a source without rows."""
    return list(iterate(source, default_split, form))


def iterate(source: str, default_split: str = "train", form: Form | None = None) -> Iterator[Row]:
    """Read the rows of a source one by one; raises RecipeError at the first bad one, and for a source without rows."""
    at, parser, empty = Cursor(source), Parser(form or Form()), True
    with explained(at):
        for record in records(at, default_split):
            empty = False
            row = parser.parse(at.where, record)
            is_cut = at.continues or at.goes_on
            yield replace(row, continues=at.continues, goes_on=at.goes_on) if is_cut else row
    if empty:
        raise RecipeError(f"{source}: is empty: it has no rows")


def guess_form(source: str) -> Form:
    """Return the form of a source by its first record: with a map where its columns have other usual names."""
    at = Cursor(source)
    with explained(at):
        record = next(iter(records(at, "train")), None)
    if not isinstance(record, dict) or recognize(record):
        return Form()
    return Form(map=suggest_map(record))


class Parser:
    """Parses the records of one source, which are all of one format."""

    def __init__(self, form: Form) -> None:
        self._map = ColumnMap(form.map) if form.map else None
        self._named = NAMES.get(form.format)
        self._format: Format | None = None
        self._first, self._form = "", ""
        self._ignored: dict[tuple[str, ...], tuple[str, ...]] = {}

    def parse(self, where: str, record: object) -> Row:
        """Check a record and return its row; raises RecipeError with its place and key."""
        if not isinstance(record, dict):
            raise RecipeError(
                f"{where}: holds {describe(record)}; an object with messages, or prompt and completion, is expected"
            )
        mapped = self._apply_map(where, record) if self._map else record
        format = self._check_named(where, mapped, self._named) if self._named else self._recognize(where, mapped)
        content = format.parse(where, mapped)
        if not self._form:
            self._form = self._describe(format, content)
        ignored = self._list_ignored(where, mapped, content)
        name = _identify(where, mapped.get("id"))
        return Row(name, content.messages, where, ignored, content.tools, content.text, form=self._form)

    def _apply_map(self, where: str, record: Record) -> Record:
        """Fill fields from other columns; a source of another format that has none of these columns stays as it is."""
        assert self._map is not None
        format = recognize(record) if self._named is None and self._map.misses(record) else None
        if format is not None and not set(self._map.columns) <= set(format.fields):
            return record
        return self._map.apply(where, record)

    def _check_named(self, where: str, record: Record, format: Format) -> Format:
        """Return the format that the recipe names; raises FieldError for a record that lacks its columns."""
        missing = format.missing(record)
        if missing:
            raise FieldError("data.format", f"{format.name}: {where}: {named_hint(format, record, missing)}")
        return format

    def _recognize(self, where: str, record: Record) -> Format:
        filled = self._map.columns if self._map and all(name in record for name in self._map.columns) else ()
        format = recognize(record, filled)
        if format is None:
            raise RecipeError(f"{where}: {hint(record)}")
        if self._format is None:
            self._format, self._first = format, where
        if format is not self._format:
            names = f"is {format.name}, but {self._first} is {self._format.name}"
            serves = not self._format.missing(record)
            advice = f"make two files of them{f', or write data.format: {self._format.name}' if serves else ''}"
            raise RecipeError(f"{where}: {names}; {advice}")
        return format

    def _describe(self, format: Format, content: Content) -> str:
        """Name a format and the columns that it is read from: "alpaca (instruction, input, output)"."""
        mapping = self._map.columns if self._map else {}
        columns = [f"{name} from {mapping[name]!r}" if name in mapping else name for name in content.used]
        return f"{format.name} ({', '.join(columns)}){f': {format.says}' if format.says else ''}"

    def _list_ignored(self, where: str, record: Record, content: Content) -> tuple[str, ...]:
        """Return the columns and keys that are not used, one tuple for all rows with the same."""
        key = (*record, "", *content.used, *content.unused)
        known = self._ignored.get(key)
        if known is None:
            for column in record:
                refuse_half_characters(where, "the name of a column", str(column))
            unused = {str(column) for column in record if column not in content.used and column != "id"}
            known = tuple(sorted(unused | content.unused))
            if len(self._ignored) < _REMEMBERED:
                self._ignored[key] = known
        return known


_REMEMBERED = 1000
"""Sets of columns whose unused ones are remembered."""


def _identify(where: str, name: object) -> str:
    """Return the row's id, its place where it has none."""
    if name is None or name == "":
        return where
    text = str(name)
    if not text.isascii():
        refuse_half_characters(where, "id", text)
    return text
