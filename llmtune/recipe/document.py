"""A section that is a whole file: loaded with overrides, and it knows where each of its keys was written."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import ModelWrapValidatorHandler, PrivateAttr, ValidationError, model_validator

from llmtune.errors import FieldError, LlmtuneError
from llmtune.fields import Closed
from llmtune.recipe.located_yaml import Located, load_yaml
from llmtune.recipe.mistakes import explain
from llmtune.recipe.paths import folders, parse_key


class Document(Closed):
    """A section that a file, or nested dicts, hold; a mistake in it is raised as RecipeError, in one line."""

    _where: Located = PrivateAttr()

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Load the document in a file, with `a.b=c` overrides applied; raises RecipeError, with file and line."""
        located = load_yaml(Path(path))
        for override in overrides:
            cls._open(located, override)
            located.override(override)
        return cls.model_validate(located)._pinned()

    def folders(self, key: str) -> tuple[Path, ...]:
        """Return the folders in which a relative path at a dotted key was looked for, the first one first."""
        return folders(self._where, parse_key(key))

    @classmethod
    def _write_out(cls, located: Located) -> None:
        """Write out what is short in the raw values, in place."""

    @classmethod
    def _open(cls, located: Located, override: str) -> None:
        """Turn a word in the raw values into the section that it is short for, where an override sets a key in it."""

    def _pinned(self) -> Self:
        """The document as it is used after it was loaded from a file."""
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _keep_places(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Write out what is short, validate, and keep where each key was written; raises RecipeError, in one line."""
        if isinstance(values, cls):
            return values
        located = values if isinstance(values, Located) else Located(Path(cls.__name__.lower()), copy.deepcopy(values))
        cls._write_out(located)
        try:
            document = handler(located.value)
        except ValidationError as error:
            raise explain(located, cls, error) from error
        document._where = located
        return document

    @property
    def file(self) -> Path | None:
        """The file from which it was loaded; None for one that was made in Python."""
        return self._where.path if self._where.places else None

    @property
    def overrides(self) -> list[str]:
        """The `a.b=c` overrides with which it was loaded."""
        return self._where.overrides

    @property
    def notes(self) -> list[str]:
        """What there is to tell of how the file was read: keys under an old name."""
        return self._where.notes

    def located(self, error: FieldError) -> LlmtuneError:
        """Turn a mistake at a key into one line that names this recipe's file and the key's line."""
        return error.kind(str(self._where.error(parse_key(error.key), error.message)))
