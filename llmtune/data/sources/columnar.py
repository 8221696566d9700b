"""Readers of files in columns, through `datasets`: Parquet, Arrow, and folders that `save_to_disk` wrote."""

import glob
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmtune.data.sources.cursor import Cursor
from llmtune.data.sources.text_files import Reader
from llmtune.errors import RecipeError, first_line, nearest
from llmtune.loggers import quiet_loggers

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def columnar(builder: str, title: str, **options: int) -> Reader:
    """Make a reader of files in columns; `datasets` reads them as a stream, without a copy in its cache."""

    def read(path: Path, at: Cursor) -> Iterator[Any]:
        import datasets

        try:
            with quiet_loggers(("datasets",), logging.CRITICAL):  # it prints what it also raises
                files = glob.escape(str(path))
                rows = datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options)
                yield from plain_records(rows, at)
        except Exception as error:
            raise RecipeError(f"{at.where}: not {title}, or a damaged one: {first_line(error)}") from error

    return read


def plain_records(rows: Iterable[Any], at: Cursor) -> Iterator[Any]:
    """Give records without the nulls that a table puts into objects, as it gives each the keys of all."""
    for number, record in enumerate(rows, 1):
        at.line = number
        nested = any(isinstance(value, list | dict) for value in record.values())
        yield {name: _without_nulls(value) for name, value in record.items()} if nested else record


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / _SAVED).is_file() or bool(saved_splits(folder))


def saved_splits(folder: Path) -> list[str]:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; none of any other."""
    if not (folder / _SAVED_SPLITS).is_file():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / _SAVED).is_file())


def saved_folder(folder: Path, split: str | None, default_split: str, name: str) -> Path:
    """Return the folder of a split, the default one where none is named; raises RecipeError for one not there."""
    splits = saved_splits(folder)
    if not splits:
        if split is not None:
            raise RecipeError(f"{name}: {folder.name} has no splits; write {name.removesuffix(f':{split}')}")
        return folder
    chosen = split or (default_split if default_split in splits else splits[0] if len(splits) == 1 else default_split)
    if chosen not in splits:
        raise RecipeError(f"{name}: has no split {chosen!r}; it has {', '.join(splits)}{nearest(chosen, splits)}")
    return folder / chosen


def read_saved(folder: Path, at: Cursor) -> Iterator[Any]:
    """Read the rows of a folder that `Dataset.save_to_disk` wrote, in its order."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
        yield from plain_records(rows.with_format(None), at)
    except Exception as error:
        raise RecipeError(f"{at.where}: not a saved data set, or a damaged one: {first_line(error)}") from error
