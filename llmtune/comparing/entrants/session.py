"""An entrant's trainings, one after another in this process: base, rows and tokenizer are read once."""

import contextlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from llmtune.comparing.budget import checkpoints_at, count_validations
from llmtune.data.example import Example
from llmtune.data.gate import Gate, gate
from llmtune.errors import FieldError
from llmtune.files import write_json
from llmtune.methods.base import BaseMethod
from llmtune.model.base import model_facts
from llmtune.model.layout import Layout
from llmtune.model.tokens import load_tokenizer, model_limits, stop_ids
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, create, locates_mistakes
from llmtune.searching.watch import Watch, train_watched
from llmtune.training.bases.base import bind_base, check_model, locate
from llmtune.training.plan_table import build_layout, lay_out, plan_table, steps_per_epoch, total_steps
from llmtune.training.prepare import Prepared, resolve
from llmtune.working import working


class Session:
    """What the trainings of an entrant share."""

    def __init__(self, recipe: Recipe, validation_rows: int) -> None:
        """`validation_rows` is how many rows each validation takes at the most."""
        self._settings, self._rows = recipe, validation_rows
        self.recipe, self.base = locate(recipe)
        self._skeleton = check_model(self.recipe, self.base)
        self.facts = model_facts(self._skeleton)
        self.data = self._read()
        self.steps_per_epoch = steps_per_epoch(self.recipe.train, len(self.data.train), 1)

    def _read(self) -> Gate:
        tokenizer = load_tokenizer(self.base)
        with working("reading and checking the data"):
            data = gate(self._settings, tokenizer, stop_ids(self.base), model_limits(self._skeleton))
        validation: list[Example] = list(data.eval[: self._rows])
        return replace(data, eval=validation)

    def validations(self, steps: int, most: int) -> list[int]:
        """The steps after which a training of so many steps is validated, so that it takes little of its time."""
        count = count_validations(steps, self.recipe.train.batch_size, len(self.data.eval), most)
        return checkpoints_at(steps, count)

    @property
    def most_steps(self) -> int:
        """The steps of the recipe as it is."""
        return total_steps(self.recipe.train, len(self.data.train), 1)

    @cached_property
    def fewest_steps(self) -> int:
        """The fewest steps that the plan can be laid over: each stage needs one."""
        plan = self.layout(self.recipe).plan
        for steps in range(1, 10_000):
            with contextlib.suppress(FieldError):
                lay_out(self.recipe.train, plan, steps)
                return steps
        return 10_000

    def variant(
        self, factor: float, steps: int, seed: int | None = None, memory: Mapping[str, str] | None = None
    ) -> Recipe:
        """The recipe with its default rates times a factor, over so many steps; another seed, other keys of memory."""
        recipe = self.recipe
        section = recipe.train.model_copy(
            update={"max_steps": steps, "seed": recipe.train.seed if seed is None else seed}
        )
        method = scaled(recipe.method.resolved(self.facts), factor)
        changed = {"train": section, "method": method, "memory": recipe.memory.model_copy(update=memory)}
        return recipe.model_copy(update=changed)

    def layout(self, recipe: Recipe) -> Layout:
        """The plan of a variant laid over the base."""
        return build_layout(recipe, self.base, self._skeleton)

    def table(self, recipe: Recipe) -> PlanTable:
        """The plan table of a variant."""
        return plan_table(recipe, self.base, self.layout(recipe), len(self.data.train), 1)

    def train(self, recipe: Recipe, folder: Path, watch: Watch, keeps: bool) -> Run:
        """Train a variant in a run's folder."""
        ready = _prepare(recipe, self, folder)
        train_watched(ready, watch, keeps)
        return ready.run

    def try_out(self, recipe: Recipe, folder: Path, watch: Watch) -> float:
        """Train a variant and leave nothing in a folder but what `watch` notes; gives the seconds before a step."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".trial-") as trial:
            self.train(recipe, Path(trial) / "run", watch, keeps=False)
            return max(0.0, time.monotonic() - began - watch.seconds)


@locates_mistakes
def _prepare(recipe: Recipe, session: Session, folder: Path) -> Prepared:
    layout = session.layout(recipe)
    table = plan_table(recipe, session.base, layout, len(session.data.train), 1)
    run = create(resolve(recipe, session.base, layout.facts), folder)
    bind_base(run, run.recipe(), session.base)
    write_json(run.plan_file, table.to_json())
    write_json(run.data_file, session.data.findings)
    return Prepared(run, session.base, session.data, layout)


def scaled(method: BaseMethod, factor: float) -> BaseMethod:
    """A method whose rates are written out with all of them times a factor, in four digits."""
    return type(method).model_validate(_scaled(method.model_dump(exclude_unset=True), factor))


def _scaled(value: object, factor: float, key: str = "") -> object:
    if isinstance(value, dict):
        return {name: _scaled(inner, factor, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_scaled(inner, factor, key) for inner in value)
    is_rate = key == "lr" and isinstance(value, int | float)
    return float(f"{float(str(value)) * factor:.4g}") if is_rate and factor != 1 else value


def rates_of(method: BaseMethod) -> float | list[float]:
    """The rates of a method at the output, one a stage where it has several."""
    values = method.model_dump()
    stages = values.get("stages")
    rates = [stage["lr"] for stage in stages] if stages else values["lr"]
    return [float(rate) for rate in rates] if isinstance(rates, list | tuple) else float(rates)
