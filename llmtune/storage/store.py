"""The files of a run at a URL, and the index that says which of them are complete."""

import contextlib
import json
import secrets
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.errors import LlmtuneError, MachineError, first_line
from llmtune.files import write_file
from llmtune.storage.urls import connect

INDEX = "store.json"
Files = dict[str, tuple[int, int]]
"""Bytes and time of the last change, in nanoseconds, by a file's name in the run's folder."""


class Gone(Exception):  # noqa: N818
    """A file was removed here before it was sent."""


@dataclass(frozen=True)
class Index:
    """Which files of a run a store holds complete; what it does not name is not part of the run."""

    files: Files
    pending: tuple[str, ...] = ()
    """Files that were being sent: after a kill they may be half there."""
    version: str = field(default_factory=lambda: secrets.token_hex(8))
    """Another one each time that the index is written: who does not know it did not write it last."""


class Store:
    """The files of one run at a URL; whatever fails there is a MachineError in one line."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, self._root = connect(url)

    def read_index(self) -> Index | None:
        """The index; None where there is none."""
        try:
            with self._explained():
                content = self._files.cat_file(self._path(INDEX))
        except FileNotFoundError:
            return None
        try:
            stored = json.loads(content)
            files = {str(name): (int(size), int(changed)) for name, (size, changed) in stored["files"].items()}
            return Index(files, tuple(map(str, stored["pending"])), str(stored["version"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MachineError(f"{self.url}/{INDEX}: is damaged, or not llmtune's: {first_line(error)}") from error

    def write_index(self, index: Index) -> None:
        """Replace the index."""
        content = {"version": index.version, "files": index.files, "pending": index.pending}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / INDEX
            file.write_text(json.dumps(content), encoding="utf-8")
            self.send(file, INDEX)

    def is_empty(self) -> bool:
        """Whether there is nothing at the URL."""
        with contextlib.suppress(FileNotFoundError), self._explained():
            self._files.invalidate_cache()
            return all(path.endswith(".partial") for path in self._files.find(self._root))
        return True

    def send(self, file: Path, name: str) -> None:
        """Write a file to the store; one in the run's folder itself is there as it was or as it is, never half.

        Raises Gone where the file is no longer here.
        """
        path = self._path(name)
        aside = path if "/" in name else f"{path}.partial"
        try:
            with self._explained():
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(file), aside)
                if aside != path:
                    self._files.mv(aside, path)
        except (FileNotFoundError, MachineError) as error:
            if not file.exists():
                raise Gone(name) from error
            if isinstance(error, FileNotFoundError):
                raise MachineError(f"{self.url}: cannot be written to: {first_line(error)}") from error
            raise

    def fetch(self, name: str, file: Path, size: int) -> None:
        """Read a file of the store to a path here, completely or not at all; raises MachineError for another size."""
        with write_file(file) as partial:
            try:
                with self._explained():
                    self._files.get_file(self._path(name), str(partial))
            except FileNotFoundError as error:
                raise MachineError(f"{self.url}/{name}: is gone from the store") from error
            if "/" in name and partial.stat().st_size != size:
                wrong = f"has {partial.stat().st_size} bytes and should have {size}"
                raise MachineError(f"{self.url}/{name}: {wrong}; is another machine at work there? try again")

    def remove(self, names: Collection[str]) -> None:
        """Remove files of the store; one that is gone already is no error."""
        for name in names:
            with contextlib.suppress(FileNotFoundError), self._explained():
                self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever a file system raises into a MachineError, but for a file that is not there."""
        try:
            yield
        except (FileNotFoundError, LlmtuneError):
            raise
        except Exception as error:
            raise MachineError(f"{self.url}: cannot be reached or written to: {first_line(error)}") from error
