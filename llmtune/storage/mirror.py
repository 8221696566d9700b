"""The folder here and the store of one run: what is brought, what is sent, and in which order."""

import contextlib
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from llmtune.errors import MachineError, RecipeError
from llmtune.files import read_json, write_json
from llmtune.run import Run
from llmtune.storage.store import INDEX, Files, Gone, Index, Store
from llmtune.storage.urls import STATE
from llmtune.working import working

_MARKS = ("recipe.yaml", "plan.json", "data.json", "arguments.json", "manifest.json", "error.txt", "report.html")
"""Files that change when a run has come further."""
Count = Callable[[int], None]
"""Called with bytes that were sent."""


class TakenOver(MachineError):  # noqa: N818
    """Another machine writes to the store now."""


class Mirror:
    """A run's folder here and its store: `bring` makes this folder as the store is, `send` the other way."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self._state = folder.absolute().parent / STATE
        self._lock = threading.Lock()
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The store, which is connected to when it is first used."""
        self._store = self._store or Store(self.url)
        return self._store

    def is_there(self) -> bool:
        """Whether the store holds a run."""
        return self.store.read_index() is not None

    def bring(self) -> None:
        """Make the folder as the store is, unless this folder was the last to write there.

        Checkpoints are left there where the training is finished.
        """
        index = self.store.read_index()
        if index is None:
            return
        versions, absent = self._known()
        names = set(index.files) if index.version not in versions else absent & set(index.files)
        checkpoints = {name for name in names if _is_checkpoint(name)}
        self._fetch(index.files, names - checkpoints)
        if index.version not in versions:
            self._remove(set(self._listing()) - set(index.files))
        if not Run(self.folder).done("train"):
            self._fetch(index.files, checkpoints)
            checkpoints = set()
        here = self._listing()
        self._remember([index.version], {name for name in checkpoints if here.get(name) != index.files[name]})

    def claim(self) -> None:
        """Become the one that writes to the store, after `bring`.

        Raises RecipeError where the store holds something else than a run.
        """
        index = self.store.read_index()
        if index is None and not self.store.is_empty():
            raise RecipeError(f"{self.url}: is not empty and holds no run of llmtune; choose another with --out")
        self._write(index, index.files if index else {}, index.pending if index else ())

    def send(self, count: Count = lambda size: None) -> None:
        """Make the store as the folder is: new files, then the index that names them, then what is gone is removed.

        Files in the run's folder itself go last, and the manifest of its steps after them. Raises TakenOver where
        another machine wrote to the store since.
        """
        with self._lock:
            index = self.store.read_index()
            if index is None:
                raise TakenOver(f"{self.url}: was removed; nothing more is sent there")
            here = self._listing()
            kept = {name: index.files[name] for name in self._still_absent() if name in index.files}
            changed = sorted((name for name in here if here[name] != index.files.get(name)), key=_order)
            gone = (set(index.files) | set(index.pending)) - set(here) - set(kept)
            if not changed and not gone:
                return
            whole = {name: facts for name, facts in index.files.items() if name not in changed or "/" not in name}
            index = self._write(index, whole, {*changed, *index.pending})
            for name in changed:
                try:
                    self.store.send(self.folder / name, name)
                except Gone:
                    gone.add(name)
                    del here[name]
                else:
                    count(here[name][0])
            self._write(index, {**kept, **here}, ())
            self.store.remove(sorted(gone))

    def unsent(self) -> int:
        """Bytes of the files that the store lacks, or has otherwise."""
        index = self.store.read_index()
        return sum(facts[0] for name, facts in self._listing().items() if not index or facts != index.files.get(name))

    def signature(self) -> object:
        """What changes when the run has come further: its checkpoints, and the files that steps leave."""
        marks = [self.folder / name for name in _MARKS]
        stats = [(file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None for file in marks]
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*")), stats

    def _listing(self) -> Files:
        """The files of the run that are complete; locks, and what is being written, have names with a dot."""
        files: Files = {}
        for where, folders, names in os.walk(self.folder, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for file in (Path(where) / name for name in names if not name.startswith(".")):
                try:
                    stat = file.stat()
                except FileNotFoundError:  # removed since
                    continue
                files[file.relative_to(self.folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        files.pop(INDEX, None)
        return files

    def _fetch(self, files: Files, names: Collection[str]) -> None:
        here = self._listing()
        needed = sorted(name for name in names if here.get(name) != files[name])
        with working(f"reading {self.url}", sum(files[name][0] for name in needed) or None, "bytes") as step:
            for name in needed:
                file, (size, changed) = self.folder / name, files[name]
                self.store.fetch(name, file, size)
                os.utime(file, ns=(changed, changed))
                step(size)

    def _remove(self, names: Collection[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        for folder in {parent for name in names for parent in (self.folder / name).parents if parent != self.folder}:
            with contextlib.suppress(OSError):  # not empty, or above the run
                folder.rmdir()

    def _still_absent(self) -> set[str]:
        """The files that only the store has; old checkpoints are none once a training began anew."""
        trained = Run(self.folder).done("train")
        return {name for name in self._known()[1] if trained or not _is_checkpoint(name)}

    def _write(self, before: Index | None, files: Files, pending: Collection[str]) -> Index:
        """Replace an index that this folder wrote or read last; raises TakenOver where it is another machine's.

        The new version is noted here first: whether or not it reaches the store, what stands there is known.
        """
        versions, absent = self._known()
        if before is not None and before.version not in versions:
            raise TakenOver(f"{self.url}: another machine works on this run now; nothing more is sent from here")
        index = Index(files, tuple(sorted(pending)))
        self._remember([*([before.version] if before else []), index.version], absent)
        self.store.write_index(index)
        return index

    def _known(self) -> tuple[list[str], set[str]]:
        """The versions of the index that this folder wrote or read last, and the files that it left on the store."""
        state = read_json(self._state)
        return state.get("versions", []), set(state.get("absent", []))

    def _remember(self, versions: list[str], absent: Collection[str]) -> None:
        write_json(self._state, {"url": self.url, "versions": versions, "absent": sorted(absent)})


def _is_checkpoint(name: str) -> bool:
    return name.startswith("checkpoints/")


def _order(name: str) -> tuple[bool, bool, bool, str]:
    """Folders first; a checkpoint's manifest after its tensors, and that of the run's steps last."""
    return "/" not in name, name == "manifest.json", name.endswith("manifest.json"), name
