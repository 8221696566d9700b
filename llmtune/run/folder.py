"""One run folder: its paths, its manifest of finished steps, and the lock that keeps a second process out."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from llmtune import __version__, recipe
from llmtune.errors import FieldError, LlmtuneError, ProofError, RecipeError
from llmtune.files import ERROR_FILE, are_fingerprints, delete, fingerprint, hold, read_json, write_json, write_text
from llmtune.recipe.sections import values

LOCK, TRAINING_LOCK = ".lock", ".training.lock"
UNOWNED = (LOCK, TRAINING_LOCK, ERROR_FILE)
"""Files that say nothing about what a folder holds."""
FOLDERS = ("delta", "merged", "exported")
FILES = ("recipe.yaml", "plan.json", "data.json", "log.jsonl", "manifest.json", "arguments.json", "report.html")
STEPS = ("train", "eval", "merge", "export", "publish", "report")
_OWN = ("eval", "merge", "publish")
"""Steps that have a section of their own, which the manifest keeps."""
HEADER = "# The resolved recipe of an llmtune run: every default, pinned revision and rate written out.\n"

Step = TypeVar("Step", bound=Callable[..., Any])


@dataclass(frozen=True)
class Run:
    """The folder of one run; every step reads and writes here and nowhere else."""

    path: Path
    settings: recipe.Recipe | None = field(default=None, compare=False)
    """The recipe that steps follow in place of the folder's: the same run with other settings."""

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def plan_file(self) -> Path:
        """The plan table and the predictions."""
        return self.path / "plan.json"

    @property
    def data_file(self) -> Path:
        """The gate's findings."""
        return self.path / "data.json"

    @property
    def log_file(self) -> Path:
        """One JSON object per step."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, each complete or absent."""
        return self.path / "checkpoints"

    @property
    def delta(self) -> Path:
        """The trained weights."""
        return self.path / "delta"

    @property
    def eval(self) -> Path:
        """base.json, tuned.json and all that repeating them needs."""
        return self.path / "eval"

    @property
    def merged(self) -> Path:
        """Full weights that stock transformers loads."""
        return self.path / "merged"

    @property
    def exported(self) -> Path:
        """Files for other programs, a folder for each form."""
        return self.path / "exported"

    @property
    def report_file(self) -> Path:
        """A page that opens offline."""
        return self.path / "report.html"

    @property
    def manifest_file(self) -> Path:
        """The finished steps, with sizes and hashes of their files."""
        return self.path / "manifest.json"

    def recipe(self) -> recipe.Recipe:
        """The resolved recipe of this run."""
        return self.settings or recipe.load(self.recipe_file)

    def keep_settings(self) -> None:
        """Write the recipe that the steps follow into the folder."""
        if self.settings:
            write_text(self.recipe_file, HEADER + self._origin() + recipe.dump(self.settings))

    def _origin(self) -> str:
        """A comment in the recipe of a combination, which nothing trained; "" in any other."""
        if self.combined is None:
            return ""
        first, *others = (str(one["name"]) for one in self.combined["runs"])
        return ascii(f"# Nothing trained by it: {first} was combined with {', '.join(others)}.")[1:-1] + "\n"

    def manifest(self) -> dict[str, Any]:
        """The manifest; without a file, one with no finished step. A step whose entry is damaged is not finished."""
        if not self.manifest_file.exists():
            return {"llmtune": __version__, "steps": {}}
        stored = read_json(self.manifest_file)
        fields = stored if isinstance(stored, dict) else {}
        entries = fields["steps"].items() if isinstance(fields.get("steps"), dict) else ()
        finished = {step: one for step, one in entries if isinstance(one, dict) and are_fingerprints(one.get("files"))}
        return {**fields, "steps": finished}

    @property
    def combined(self) -> dict[str, Any] | None:
        """From which runs its delta was combined, and how; None for a run that was trained."""
        combined = self.manifest()["steps"].get("train", {}).get("combined")
        return combined if isinstance(combined, dict) and combined.get("runs") else None

    def done(self, step: str) -> bool:
        """Whether a step finished under the recipe's settings and its files are there with the recorded sizes."""
        entry = self.manifest()["steps"].get(step)
        if entry is None or ("settings" in entry and entry["settings"] != self._own_settings(step)):
            return False
        files = ((self.path / name, facts) for name, facts in entry["files"].items())
        return all(path.is_file() and path.stat().st_size == facts["bytes"] for path, facts in files)

    def verify(self, step: str, error: type[LlmtuneError] = ProofError) -> dict[str, dict[str, Any]]:
        """Fingerprints of the files that step train, merge or export left in its folder, named as in the manifest.

        Raises `error` for a file that was changed or removed since the step finished, or added to delta/ or merged/.
        """
        folder = {"train": self.delta, "merge": self.merged, "export": self.exported}[step]
        is_combined = step == "train" and self.combined is not None
        name = "combine" if is_combined else step
        command = f"llmtune {name} {'RUN_A RUN_B' if is_combined else shlex.quote(str(self.path))}"
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        entry = self.manifest()["steps"].get(step)
        if entry is None or not files:
            raise error(f"{folder}: is missing or not finished; first: {command}")
        expected = entry["files"]
        if step == "export":  # what other programs made of the files may lie beside them
            files = [file for file in files if file.relative_to(self.path).as_posix() in expected]
        actual = {file.relative_to(self.path).as_posix(): fingerprint(file) for file in files}
        for file in sorted({*expected, *actual}):
            if actual.get(file) != expected.get(file):
                if file not in expected:
                    raise error(f"{self.path / file}: was added after `llmtune {name}`; remove it")
                change = "changed" if file in actual else "removed"
                raise error(f"{self.path / file}: was {change} after `llmtune {name}`; run it again: {command}")
        return actual

    def mark(self, step: str, outputs: list[Path], **facts: object) -> None:
        """Record that a step finished: its facts, and size and SHA-256 of each file in `outputs` (files or folders)."""
        for missing in (output for output in outputs if not output.exists()):
            raise LlmtuneError(f"{missing}: the step {step} should have left it and did not")
        manifest = self.manifest()
        files = sorted(file for output in outputs for file in (output.rglob("*") if output.is_dir() else [output]))
        manifest["steps"][step] = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {str(file.relative_to(self.path)): fingerprint(file) for file in files if file.is_file()},
            **({"settings": self._own_settings(step)} if step in _OWN else {}),
            **facts,
        }
        write_json(self.manifest_file, manifest)

    def _own_settings(self, step: str) -> dict[str, Any]:
        """The values of the section that a step follows; none without a recipe."""
        if not (self.settings or self.recipe_file.is_file()):
            return {}
        return dict(values(self.recipe()).get(step) or {})

    def forget(self, step: str) -> None:
        """Record that a step, and the steps that build on it, must run again."""
        manifest = self.manifest()
        for later in STEPS[STEPS.index(step) :]:
            manifest["steps"].pop(later, None)
        write_json(self.manifest_file, manifest)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of this run; raises RecipeError where one is using it, or trains in it still.

        What a killed process had begun to write is removed.
        """
        refuse_file(self.path)
        with hold(self.path / LOCK, self._busy):
            with self.training():
                for partial in partials(self.path):
                    delete(partial)
            yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Keep other trainings out of this run, for as long as this process lives, whatever becomes of its command."""
        refuse_file(self.path)
        with hold(self.path / TRAINING_LOCK, self._busy):
            yield

    @property
    def _busy(self) -> str:
        return f"{self.path}: another llmtune process is at work in this folder; wait until it ends"


def locates_mistakes(step: Step) -> Step:
    """Decorate a function of a recipe or a run: a FieldError that it raises gets the recipe's file and line."""

    @wraps(step)
    def located(subject: "Run | recipe.Recipe", *arguments: object, **options: object) -> Any:
        try:
            return step(subject, *arguments, **options)
        except FieldError as error:
            settings = subject.recipe() if isinstance(subject, Run) else subject
            raise settings.located(error) from error

    return cast(Step, located)


def partials(path: Path) -> list[Path]:
    """What killed processes had begun to write in a run's folder, by the names that a run gives to files."""
    inside = [*(path / "checkpoints").glob(".step-*.partial*"), *(path / "eval").glob(".*.partial*")]
    linked = [file for name in FOLDERS for file in (path / name).glob(f".{name}.partial*")]
    exported = [file for file in (path / "exported").glob(".*.partial*") if file not in linked]
    own = (file for name in (*FILES, *FOLDERS) for file in path.glob(f".{name}.partial*"))
    return [*inside, *linked, *exported, *own]


def refuse_combined(run: Run) -> None:
    """Raise RecipeError for a run that was combined from others, where one is to be trained."""
    if run.combined is not None:
        raise RecipeError(
            f"{run.path}: was combined from other runs, and nothing trains there; choose another with --out"
        )


def refuse_file(path: Path) -> None:
    """Raise RecipeError for a file where a run's folder should be."""
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path}: is a file, not a folder for a run; choose another with --out")
