"""Folders and patterns of files: which files of them are read, in which order."""

import glob
import re
from pathlib import Path

from llmtune.data.sources.columnar import is_saved, saved_folder
from llmtune.data.sources.files import ENDINGS, reader_of
from llmtune.errors import RecipeError, nearest
from llmtune.files import user_path

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_SPLIT_OF_WORD = {word: split for split, words in _SPLITS.items() for word in words}


def split_name(source: str) -> tuple[str, str | None]:
    """Take `folder:split` apart; the split is None where a source is no folder with one."""
    folder, colon, split = source.rpartition(":")
    if colon and split and "/" not in split and not user_path(source).exists() and user_path(folder).is_dir():
        return folder, split
    return source, None


def matches(pattern: str) -> list[Path]:
    """The files that a pattern names, sorted; none where it is no pattern."""
    if not glob.has_magic(pattern):
        return []
    paths = (Path(name) for name in glob.glob(str(user_path(pattern)), recursive=True))
    return sorted(path for path in paths if path.is_file())


def files_of(source: str, default_split: str) -> list[Path] | None:
    """Return the files, or the saved folder, that a local source names; None for what is no folder and no pattern.

    Raises RecipeError for a folder without rows, for a split that it does not have, and for files of no known kind.
    """
    name, split = split_name(source)
    folder = user_path(name)
    if folder.is_dir():
        return (
            [saved_folder(folder, split, default_split, source)]
            if is_saved(folder)
            else _of_folder(folder, split, default_split, source)
        )
    if folder.exists() or not glob.has_magic(source):
        return None
    files = matches(source)
    unknown = next((file for file in files if reader_of(file.name) is None), None)
    if unknown is not None:
        raise RecipeError(f"{source}: matches {unknown.name}, a kind of file that holds no rows; try {ENDINGS}")
    return files


def _of_folder(folder: Path, split: str | None, default_split: str, source: str) -> list[Path]:
    """Return a folder's files; where their names tell several splits, those of one split."""
    files = [path for path in sorted(folder.iterdir()) if _holds_rows(path)]
    if not files:
        below = next((path for path in sorted(folder.rglob("*")) if _holds_rows(path)), None)
        hint = f"; write {source}/**/*{''.join(below.suffixes[-2:])} for the files below it" if below else ""
        raise RecipeError(f"{source}: is a folder without a file that ends in {ENDINGS}{hint}")
    splits = {path: _split_of(path) for path in files}
    there = sorted({name for name in splits.values() if name})
    if split is None and len(there) < 2:
        return files
    chosen = split or default_split
    chosen = _SPLIT_OF_WORD.get(chosen, chosen)
    if chosen not in there:
        has = f"its files are of {', '.join(there)}" if there else "its files' names tell no split"
        raise RecipeError(f"{source}: has no split {chosen!r}; {has}{nearest(chosen, there)}")
    return [path for path in files if splits[path] == chosen]


def _holds_rows(path: Path) -> bool:
    return not path.name.startswith(".") and reader_of(path.name) is not None and path.is_file()


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name starts with, as in train-00000-of-00002.parquet."""
    return _SPLIT_OF_WORD.get(re.split(r"[^a-z]", path.name.lower(), maxsplit=1)[0])
