"""An entrant's way: the rate's search, a training and an evaluation for each seed, with all of it kept as it goes."""

import shutil
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Unpack

from llmtune.api.steps import at_work, do
from llmtune.arms.record import ArmFacts, ArmRecord, SeedRecord, Status
from llmtune.comparing.budget import MOST_EPOCHS, MOST_VALIDATIONS, VALIDATED, steps_in, trial_steps
from llmtune.comparing.entrants.measure import seed_record
from llmtune.comparing.entrants.search import Pace, Search, best_factor, remove_leftovers
from llmtune.comparing.entrants.session import Session, rates_of
from llmtune.comparing.folder import Folder
from llmtune.comparing.request import Entrant
from llmtune.errors import Interrupted
from llmtune.launch.signals import handling
from llmtune.recipe.sections import Recipe
from llmtune.run import Run
from llmtune.searching.watch import Watch

PROBE_STEPS = 4
PROBE_FACTOR = 0.1
"""The rate of the first steps, which are for the pace alone, as a multiple of the default one."""
RANDOM = "its weights are random"
"""Why the base of scratch is not asked."""
LONG = 900.0
"""Seconds of training from which on the recipe's checkpoints are written: less is trained again after a kill."""


class ArmRun:
    """One entrant of a comparison, at work in its folder."""

    def __init__(self, folder: Folder, name: str, seconds: float, training: float | None, began: float) -> None:
        """`seconds` are all that it may take, `training` those of each seed; None trains the recipe's epochs."""
        self._folder, self._name, self._seconds, self._training = folder, name, seconds, training
        self._request = folder.request()
        self._entrant: Entrant = next(one for one in folder.entrants() if one.name == name)
        self.recipe: Recipe = folder.recipe_of(self._entrant)
        self._home = folder.arm(name)
        self._record: ArmRecord = folder.record(name) or self._fresh()
        self._earlier = 60 * self._record.get("minutes", 0.0) + folder.base_seconds(name)
        self._began = began

    def _fresh(self) -> ArmRecord:
        arm = self._entrant.arm
        return {"name": arm.name, "set": list(arm.set), "size": self._entrant.size, "status": "running"}

    @property
    def spent(self) -> float:
        """Seconds that it took so far, in earlier processes too."""
        return self._earlier + time.monotonic() - self._began

    def keep(self, status: Status | None = None, **facts: Unpack[ArmFacts]) -> None:
        """Write the record with these facts, and the minutes so far, but for those that asked the untrained base."""
        self._record = {**self._record, **facts, "status": status or self._record["status"]}
        self._record["minutes"] = (self.spent - self._folder.base_seconds(self._name)) / 60
        self._folder.write_record(self._name, self._record)

    def fail(self, reason: str) -> None:
        """Keep why it failed."""
        self.keep("failed", reason=reason)

    def go(self) -> None:
        """Do what is left; raises LlmtuneError where it cannot be done, Interrupted after a stop signal."""
        self._home.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._home)
        self.keep("running", trains=self._training)
        session = Session(self.recipe, self._folder.head()["validation_rows"])
        table = session.table(self.recipe).to_json()
        self.keep(method=self.recipe.method_words, plan=table)
        pace, memory = self._pace(session)
        pace = self._search(session, pace, memory) or pace
        self._train_seeds(session, pace, memory)
        self.keep("done")

    def _pace(self, session: Session) -> tuple[Pace, dict[str, str]]:
        """Seconds of a start and of a step, by a few steps, and how frozen blocks are kept in all trainings."""
        steps = max(PROBE_STEPS, session.fewest_steps)
        watch = Watch(())
        load = session.try_out(session.variant(PROBE_FACTOR, steps), self._home, watch)
        pace = Pace(load, watch.step_seconds)
        rows = self._seconds / max(pace.step, 1e-9) * session.recipe.train.batch_size
        is_open = session.recipe.memory.frozen_blocks == "auto"
        # Trials and seeds are trainings of the same rows: together they are long enough for what one alone is not.
        caches = is_open and rows > 2 * len(session.data.train) and any(session.layout(session.recipe).boundaries)
        return pace, {"frozen_blocks": "cache"} if caches else {}

    def _search(self, session: Session, pace: Pace, memory: dict[str, str]) -> Pace | None:
        seconds = self._left_for_search(pace)
        steps = trial_steps(seconds, pace.step, pace.load, self._steps_of(session, pace)[0])
        if not steps:
            tries = self._record.get("search", [])
            self.keep(search=tries, lr=rates_of(session.variant(best_factor(tries), 1).method))
            return None
        steps = max(session.fewest_steps, steps)
        facts = {"arm": self._name, "set": " ".join(self._entrant.set)}
        search = Search(session, self._home, facts, steps, memory, lambda tries: self.keep(search=tries))
        latest = search.run(time.monotonic() + seconds)
        rates = rates_of(session.variant(best_factor(self._record["search"]), steps).method)
        self.keep(lr=rates)
        return latest

    def _left_for_search(self, pace: Pace) -> float:
        """Seconds of the share that trainings and evaluations do not need; a third of it where epochs are equal."""
        left = self._seconds - self.spent
        if self._training is None:
            return left / 3
        evaluation = self._folder.head()["costs"]["evaluation"]
        return left - self._request.seeds * (self._training + pace.load + evaluation)

    def _train_seeds(self, session: Session, pace: Pace, memory: dict[str, str]) -> None:
        steps = self._steps(session, pace)
        factor = best_factor(self._record["search"])
        first = session.recipe.train.seed
        for seed in range(first, first + self._request.seeds):
            known = self._record.get("seeds", [])
            if any(one["seed"] == seed for one in known):
                continue
            recipe = session.variant(factor, steps, seed, memory)
            done = self._train(session, recipe, seed)
            self.keep(seeds=[*known, done])

    def _steps(self, session: Session, pace: Pace) -> int:
        """The steps of every seed: as before in a process that was stopped, else what fits into its seconds."""
        if "steps" in self._record:
            return self._record["steps"]
        steps, is_limited = self._steps_of(session, pace)
        if is_limited:
            self._record["limited"] = f"{MOST_EPOCHS} times the recipe's epochs"
        self.keep(steps=steps)
        return steps

    def _steps_of(self, session: Session, pace: Pace) -> tuple[int, bool]:
        """The steps that fit into a seed's seconds, or the recipe's; and whether the most epochs ended them."""
        if self._training is None:
            return max(session.most_steps, session.fewest_steps), False
        most = max(MOST_EPOCHS * session.most_steps, session.fewest_steps)
        steps, is_limited = steps_in(self._training * (1 - VALIDATED), pace.step, most)
        return max(steps, session.fewest_steps), is_limited

    def _train(self, session: Session, recipe: Recipe, seed: int) -> SeedRecord:
        """Train and evaluate one seed in a run folder of its own."""
        path = self._home / f"seed-{seed}"
        _remove_other(path, recipe)
        run = Run(path)
        if not run.done("train"):
            is_long = (self._training or LONG) >= LONG
            steps = recipe.train.max_steps or 1
            watch = Watch(session.validations(steps, MOST_VALIDATIONS), saves=is_long, goes_on=True)
            session.train(recipe, path, watch, keeps=True)
        with at_work(run), _stopping():
            if not run.done("eval"):
                do(run, "eval", unasked=RANDOM if self._entrant.arm.name == "scratch" else None)
            do(run, "report")
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        name = str(path.relative_to(self._folder.path))
        return seed_record(run, name, seed, self._folder.head()["metric"], session.steps_per_epoch)


def _remove_other(path: Path, recipe: Recipe) -> None:
    """Remove the run of an earlier, shorter training of this seed."""
    file = path / "recipe.yaml"
    if file.is_file() and Recipe.load(file).train != recipe.train:
        shutil.rmtree(path)


def _stopping() -> AbstractContextManager[None]:
    """Let SIGTERM end an evaluation as Ctrl-C does."""

    def stop(number: int) -> None:
        raise Interrupted("stopped")

    return handling([signal.SIGTERM], stop)
