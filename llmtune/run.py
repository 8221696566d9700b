"""One run directory: its paths, its manifest, what is done, and the lock that keeps a second process out."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtune import __version__, recipe
from llmtune.errors import LlmtuneError, RecipeError

STEPS = ("train", "eval", "merge", "publish", "report")


@dataclass(frozen=True)
class Run:
    """The folder of one run; every step reads and writes here and nowhere else."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def plan_file(self) -> Path:
        """The plan table and what was predicted."""
        return self.path / "plan.json"

    @property
    def data_file(self) -> Path:
        """The gate's findings."""
        return self.path / "data.json"

    @property
    def log_file(self) -> Path:
        """One JSON object a step."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, each complete or absent."""
        return self.path / "checkpoints"

    @property
    def delta(self) -> Path:
        """What was trained."""
        return self.path / "delta"

    @property
    def eval(self) -> Path:
        """base.json, tuned.json and what is needed to repeat them."""
        return self.path / "eval"

    @property
    def merged(self) -> Path:
        """Full weights that stock transformers loads."""
        return self.path / "merged"

    @property
    def report_file(self) -> Path:
        """The page that opens offline."""
        return self.path / "report.html"

    @property
    def manifest_file(self) -> Path:
        """What is done, with sizes and hashes."""
        return self.path / "manifest.json"

    def recipe(self) -> recipe.Recipe:
        """The resolved recipe of this run."""
        return recipe.load(self.recipe_file)

    def manifest(self) -> dict[str, Any]:
        """The manifest, with no step done where there is none yet."""
        if not self.manifest_file.exists():
            return {"llmtune": __version__, "steps": {}}
        return dict(json.loads(self.manifest_file.read_text()))

    def done(self, step: str) -> bool:
        """Whether a step finished and each file that it left is there with the size that was written down."""
        entry = self.manifest()["steps"].get(step)
        if entry is None:
            return False
        files = ((self.path / name, facts) for name, facts in entry["files"].items())
        return all(path.is_file() and path.stat().st_size == facts["bytes"] for path, facts in files)

    def mark(self, step: str, outputs: list[Path], **facts: Any) -> None:
        """Record that a step finished: its facts, and size and SHA-256 of each file in `outputs` (files or folders)."""
        manifest = self.manifest()
        files = sorted(file for output in outputs for file in (output.rglob("*") if output.is_dir() else [output]))
        manifest["steps"][step] = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {str(file.relative_to(self.path)): fingerprint(file) for file in files if file.is_file()},
            **facts,
        }
        write_json(self.manifest_file, manifest)

    def forget(self, step: str) -> None:
        """Record that a step, and the steps that build on it, are to be done again."""
        manifest = self.manifest()
        for later in STEPS[STEPS.index(step) :]:
            manifest["steps"].pop(later, None)
        write_json(self.manifest_file, manifest)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of this run; raises LlmtuneError where one is at work."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecipeError(
                    f"{self.path}: another llmtune process is at work in this folder; wait or use --out"
                ) from error
            yield


def open_run(path: Path) -> Run:
    """The run in an existing folder; raises RecipeError where there is none."""
    run = Run(path)
    if not run.recipe_file.is_file():
        raise RecipeError(f"{path}: holds no run (no recipe.yaml); give the folder that `llmtune run` wrote")
    return run


def create(resolved: recipe.Recipe, path: Path, overwrite: bool = False) -> Run:
    """The run folder for a resolved recipe: new, or the one that holds this very recipe; raises RecipeError."""
    run = Run(path)
    text = recipe.dump(resolved)
    if overwrite and run.recipe_file.is_file():
        shutil.rmtree(path)
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path}: is a file, not a folder for a run; choose another with --out")
    others = [name.name for name in path.iterdir() if name.name != ".lock"] if path.is_dir() else []
    if others and not run.recipe_file.is_file():
        raise RecipeError(
            f"{path}: is not empty and holds no run ({sorted(others)[0]}, ...); choose another with --out"
        )
    if others and run.recipe_file.read_text() != text:
        changed = _difference(run.recipe_file.read_text(), text)
        raise RecipeError(f"{path}: holds another run ({changed}); choose another folder with --out, or --overwrite it")
    path.mkdir(parents=True, exist_ok=True)
    write_text(run.recipe_file, text)
    return run


def _difference(old: str, new: str) -> str:
    before, after = old.splitlines(), new.splitlines()
    pairs = [(a.strip(), b.strip()) for a, b in zip(before, after, strict=False) if a != b]
    return f"{pairs[0][0]} there, {pairs[0][1]} here" if pairs else "more or fewer keys"


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a file that an earlier step wrote; raises LlmtuneError where it is gone or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlmtuneError(f"{path}: cannot be read: {error}") from error
