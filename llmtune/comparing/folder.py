"""The folder of a comparison: its recipe, what was asked, what each worker leaves, and compare.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from llmtune.arms.arm import Arm
from llmtune.arms.record import ArmRecord, Baseline
from llmtune.arms.saved import seconds_asked
from llmtune.arms.stored import FILE
from llmtune.comparing.request import Entrant, Request
from llmtune.errors import LlmtuneError, RecipeError
from llmtune.files import read_json, write_json, write_text
from llmtune.recipe.compare import difference
from llmtune.recipe.sections import Recipe
from llmtune.recipe.standing import recipe_text, standing
from llmtune.run import Run

HEADER = "The recipe that the arms of a comparison override."
SETTINGS = (
    "eval.suite=quick",
    "merge.enabled=false",
    "publish=null",
    "track=[]",
    "launch.processes=1",
    "train.keep_best=false",
    "train.patience=null",
)
"""What every arm has: held-out rows are what is compared, each trains to its end, and nothing leaves the machine."""


class Head(TypedDict):
    """What is known before an arm trains: what compare.json says beside arms and baselines."""

    files: dict[str, Any]
    """The SHA-256 of each source of rows."""
    recipe: dict[str, Any]
    base: dict[str, Any]
    metric: str
    higher_is_better: bool
    held_out: dict[str, Any]
    train: dict[str, Any]
    machine: dict[str, Any]
    costs: dict[str, float]
    """What a training takes beside its steps, in seconds: see budget.Costs."""
    validation_rows: int
    """Rows of each validation."""
    predicted: dict[str, dict[str, float | None]]
    """Bytes and seconds of each arm, by name."""
    skipped: dict[str, str]
    """Why an arm cannot be, by name."""
    scratch: NotRequired[list[str]]
    """The overrides that train the same architecture from random weights."""


@dataclass(frozen=True)
class Folder:
    """A comparison's folder, and the paths in it."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The recipe that the arms override, with absolute paths."""
        return self.path / "recipe.yaml"

    @property
    def request_file(self) -> Path:
        """What was asked, and what decides whether others may go on here."""
        return self.path / "request.json"

    @property
    def compare_file(self) -> Path:
        """Every arm and baseline that ended."""
        return self.path / FILE

    @property
    def page(self) -> Path:
        """The page of the comparison."""
        return self.path / "index.html"

    @property
    def winner(self) -> Path:
        """A recipe that runs."""
        return self.path / "winner.yaml"

    @property
    def baselines_file(self) -> Path:
        """The baselines that ended."""
        return self.path / "baselines.json"

    @property
    def base_file(self) -> Path:
        """What the untrained base answered, before any arm."""
        return self.path / "base.json"

    def arm(self, name: str) -> Path:
        """The folder of an entrant."""
        return self.path / "arms" / name

    def record(self, name: str) -> ArmRecord | None:
        """What an entrant's worker left; None where it left nothing that can be read."""
        try:
            return cast(ArmRecord, read_json(self.arm(name) / "arm.json"))
        except LlmtuneError:
            return None

    def write_record(self, name: str, record: ArmRecord) -> None:
        """Keep what an entrant came to so far."""
        self.arm(name).mkdir(parents=True, exist_ok=True)
        write_json(self.arm(name) / "arm.json", record)

    def base_answers(self) -> dict[str, Any] | None:
        """The base's `results`, and the `seconds` of the process that asked it; None where something is to be asked."""
        try:
            stored = cast(dict[str, Any], read_json(self.base_file))
        except LlmtuneError:
            return None
        return stored if stored.get("asking") == self.asking() else None

    def base_seconds(self, name: str | None = None) -> float:
        """The seconds in which entrants, or one of them, asked the untrained base; with those before any of them."""
        files = self.path.glob(f"arms/{name or '*'}/seed-*/manifest.json")
        before = None if name else self.base_answers()
        of_entrants = sum(sum(seconds_asked(Run(file.parent)).values()) for file in files)
        return of_entrants + (float(before["seconds"]) if before else 0.0)

    def baselines(self) -> list[Baseline]:
        """The baselines that ended."""
        return cast(list[Baseline], read_json(self.baselines_file)) if self.baselines_file.is_file() else []

    def add_baseline(self, baseline: Baseline) -> None:
        """Keep a baseline that ended, in place of what it was before."""
        others = [one for one in self.baselines() if (one["name"], one["size"]) != (baseline["name"], baseline["size"])]
        write_json(self.baselines_file, [*others, baseline])

    def stored(self) -> dict[str, Any] | None:
        """What was asked before; None in a new folder. Raises RecipeError for a folder that is in use otherwise."""
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(f"{self.path}: is a file, not a folder for a comparison; choose another with --out")
        if self.request_file.is_file():
            return cast(dict[str, Any], read_json(self.request_file))
        names = sorted(file.name for file in self.path.iterdir()) if self.path.is_dir() else []
        foreign = [name for name in names if name not in (".lock", "recipe.yaml")]
        if foreign or (self.recipe_file.is_file() and not self._is_own_recipe()):
            name = foreign[0] if foreign else self.recipe_file.name
            raise RecipeError(f"{self.path}: is not empty and holds no comparison ({name}); choose another with --out")
        return None

    def _is_own_recipe(self) -> bool:
        return self.recipe_file.read_text(encoding="utf-8").startswith(HEADER)

    def refuse_other_recipe(self, settings: Recipe) -> None:
        """Raise RecipeError where the comparison here is of another recipe."""
        change = difference(Recipe.load(self.recipe_file), standing(settings))
        if change:
            raise RecipeError(f"{self.path}: compares another recipe ({change}); choose another with --out")

    def refuse_other_rows(self, files: Mapping[str, object]) -> None:
        """Raise RecipeError where the rows of the comparison here have changed."""
        before = self.stored()
        if before is not None and before["head"]["files"] != files:
            raise RecipeError(f"{self.path}: the data changed since this comparison began; choose another with --out")

    def write_request(self, settings: Recipe, request: Request, head: Head) -> None:
        """Keep what is asked, what is known before an arm trains, and the recipe that arms override."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe_file, recipe_text(standing(settings), [HEADER]))
        write_json(self.request_file, {"request": request.to_json(), "head": head})

    def request(self) -> Request:
        """What was asked; raises RecipeError where the folder holds no comparison."""
        return Request.from_json(self._stored()["request"])

    def head(self) -> Head:
        """What was known before an arm trained."""
        return cast(Head, self._stored()["head"])

    def _stored(self) -> dict[str, Any]:
        values = self.stored()
        if values is None:
            raise RecipeError(f"{self.path}: holds no comparison; llmtune compare RECIPE makes one")
        return values

    def entrants(self) -> list[Entrant]:
        """Every arm, and scratch where it is asked for, at every size."""
        request, scratch = self.request(), self.head().get("scratch")
        arms = [*request.arms, *([Arm("scratch", tuple(scratch))] if scratch else [])]
        return [Entrant(arm, size) for size in request.sizes for arm in arms]

    def asking(self) -> list[str]:
        """The overrides that leave out worked examples where no baseline wants them."""
        return [] if "few-shot" in self.request().baselines else ["eval.shots=0"]

    def recipe_of(self, entrant: Entrant | None) -> Recipe:
        """The recipe of an entrant, as it trains; of none, the one whose base is asked before them."""
        return Recipe.load(self.recipe_file, [*(entrant.set if entrant else ()), *SETTINGS, *self.asking()])


def is_comparison(path: Path) -> bool:
    """Whether a folder holds a comparison that may go on."""
    return (path / "request.json").is_file()
