"""Runs what a comparison still lacks: baselines, then entrants, each for its share of the seconds that are left."""

from pathlib import Path
from typing import Any

from llmtune.advising.recall import remember
from llmtune.arms.record import ArmRecord, Comparison
from llmtune.arms.verdict import conclude
from llmtune.comparing import outcome
from llmtune.comparing.budget import Costs, Shares, check_minutes, share_of, training_seconds, validation_rows
from llmtune.comparing.folder import Folder, Head
from llmtune.comparing.progress import following, result_line
from llmtune.comparing.request import Entrant, Request
from llmtune.comparing.winner import write_winner
from llmtune.files import write_json
from llmtune.pool.task import Ended, Pool, Task
from llmtune.recipe.sections import Recipe
from llmtune.reporting.comparison.page import write_page

MODULE = "llmtune.comparing.worker"
START_SECONDS = 8.0
"""Seconds in which a worker imports torch and reads the rows."""
LONGER = 1.25
"""How much longer a seed may be given to train before what is trained is trained again."""
_LOST = "its process ended without a word; see log.txt beside its arm.json"


class Running:
    """A comparison at work."""

    def __init__(self, folder: Folder, request: Request, head: Head, pool: Pool, on: str) -> None:
        self._folder, self._request, self._head, self._pool = folder, request, head, pool
        self._gpus = 0 if on == "local" else 1
        self._slots = pool.width(self._gpus)
        known = head["costs"]
        self._costs = Costs(START_SECONDS, known["load"], known["evaluation"], known["base"], known["step"])

    def head(self, before: Head | None) -> Head:
        """What is known now, with the validation rows that a comparison began with, else those that its time allows."""
        training = self._training() if before is None else None
        batch, step = int(self._head["recipe"]["train"]["batch_size"]), self._costs.step
        rows = before["validation_rows"] if before else validation_rows(training or 1e9, step, batch)
        self._head = {**self._head, "validation_rows": rows}
        return self._head

    def _entrants(self) -> list[Entrant]:
        skipped = self._head["skipped"]
        return [one for one in self._folder.entrants() if one.arm.name not in skipped]

    def _known(self) -> list[Entrant]:
        return self._entrants() if self._folder.request_file.is_file() else []

    def _shares(self) -> Shares:
        """The entrants that share the minutes."""
        arms = [arm for arm in self._request.arms if arm.name not in self._head["skipped"]]
        request = self._request
        return Shares(len(arms), "scratch" in request.baselines, len(request.sizes), request.seeds)

    def check(self) -> None:
        """Raise RecipeError where the minutes are too few for one arm."""
        check_minutes(self._request.minutes, self._baseline_seconds(), self._shares(), self._costs, self._slots)

    def run(self, settings: Recipe) -> Comparison:
        """Run what is left, and write what it says; raises LlmtuneError, Interrupted after a stop signal."""
        self._reopen_failed()
        outcome.write(self._folder)
        self._run_baselines(settings)
        training = self._training()
        waiting = [one for one in self._entrants() if self._is_open(one, training)]
        together = waiting if self._slots > 1 else []
        if together:
            self._run_together(together, training)
        else:
            for place, entrant in enumerate(waiting):
                self._run_one(entrant, waiting[place:], len(waiting), training)
        return self._conclude()

    def _reopen_failed(self) -> None:
        """Let entrants that failed before be tried again, from their rates on where none could be trained with."""
        for one in self._known():
            record = self._folder.record(one.name)
            if record is None or record["status"] != "failed":
                continue
            again: Any = {key: value for key, value in record.items() if key != "reason"}
            if not any(tried["state"] == "complete" for tried in record.get("search", [])):
                (self._folder.arm(one.name) / "study.db").unlink(missing_ok=True)
            again["status"] = "running"
            self._folder.write_record(one.name, again)

    def _run_baselines(self, settings: Recipe) -> None:
        from llmtune.comparing.baselines.run import run_missing

        scratch = run_missing(self._folder, settings)
        if scratch is not None:
            self._head = {**self._head, "scratch": list(scratch.set)}
            self._folder.write_request(settings, self._request, self._head)
        outcome.write(self._folder)

    def _baseline_seconds(self) -> float:
        """What baselines took, and the untrained base's answers, which an arm's evaluation asks for."""
        others = sum(one.get("seconds", 0.0) for one in self._folder.baselines())
        return others + (self._folder.base_seconds() or self._costs.base)

    def _training(self) -> float | None:
        """The seconds that every seed trains; as long as before where arms are trained and it is not much less."""
        if self._request.equal == "epochs":
            return None
        left = self._request.minutes * 60 - self._baseline_seconds()
        share = share_of(left * self._slots, self._shares().entrants)
        new = training_seconds(share, self._request.seeds, self._costs)
        records = [self._folder.record(one.name) for one in self._known()]
        before = max((one.get("trains") or 0.0 for one in records if one), default=0.0)
        return before if before * LONGER >= new else new

    def _is_open(self, entrant: Entrant, training: float | None) -> bool:
        """Whether something is left to train; seeds that trained for much less than others will are forgotten."""
        record = self._folder.record(entrant.name)
        if record is None or record["status"] == "running":
            return True
        if record["status"] != "done":
            return False
        if training and training > LONGER * (record.get("trains") or training) and "limited" not in record:
            again: Any = {key: value for key, value in record.items() if key not in ("seeds", "steps", "reason")}
            again["status"] = "running"
            self._folder.write_record(entrant.name, again)
            return True
        return len(record.get("seeds", [])) < self._request.seeds

    def _seconds_left(self) -> float:
        records = [self._folder.record(one.name) for one in self._entrants()]
        done = sum(60 * one.get("minutes", 0.0) for one in records if one and one["status"] != "running")
        return self._request.minutes * 60 - self._baseline_seconds() - done / self._slots

    def _share(self, waiting: int, training: float | None) -> float:
        """The seconds of one of so many entrants: an equal part of what is left, or what its trainings need."""
        equal = share_of(self._seconds_left() * self._slots, waiting)
        seeds, costs = self._request.seeds, self._costs
        needs = costs.start + seeds * ((training or 0.0) + costs.load + costs.evaluation)
        return max(equal, needs, costs.least(seeds))

    def _run_one(self, entrant: Entrant, waiting: list[Entrant], count: int, training: float | None) -> None:
        share = self._share(len(waiting), training)
        place = f"{count - len(waiting) + 1} of {count}:"
        with following(self._folder, [entrant], place, self._left(entrant, share)):
            self._pool.run([self._task(entrant, share, training)], self._told)

    def _run_together(self, waiting: list[Entrant], training: float | None) -> None:
        share = self._share(len(waiting), training)
        rounds = -(-len(waiting) // self._slots)
        with following(self._folder, waiting, "", rounds * share):
            self._pool.run([self._task(one, share, training) for one in waiting], self._told)

    def _left(self, entrant: Entrant, share: float) -> float:
        record = self._folder.record(entrant.name)
        return share - 60 * record.get("minutes", 0.0) if record else share

    def _task(self, entrant: Entrant, share: float, training: float | None) -> Task:
        words = [str(self._folder.path.absolute()), entrant.name, f"--seconds={share:.1f}"]
        words += [] if training is None else [f"--training={training:.2f}"]
        log = Path(self._folder.arm(entrant.name)) / "log.txt"
        return Task(entrant.name, MODULE, tuple(words), self._gpus, log)

    def _told(self, end: Ended) -> None:
        """Keep why an entrant failed whose process could not, tell of it, and write compare.json."""
        entrant = next(one for one in self._entrants() if one.name == end.task.name)
        record = self._folder.record(entrant.name)
        if record is None or record["status"] == "running":
            arm = entrant.arm
            blank: ArmRecord = {"name": arm.name, "set": list(arm.set), "size": entrant.size, "status": "failed"}
            lost: Any = {**(record or blank), "status": "failed", "reason": end.message or _LOST}
            self._folder.write_record(entrant.name, lost)
            record = lost
        outcome.write(self._folder)
        print(result_line(record, entrant.name, self._head["metric"]), flush=True)

    def _conclude(self) -> Comparison:
        """Write what the comparison says: compare.json, the page and the winner's recipe."""
        comparison = outcome.gather(self._folder)
        verdict = comparison["verdict"] = conclude(comparison)
        write_json(self._folder.compare_file, comparison)
        write_winner(self._folder, comparison)
        write_page(comparison, verdict, self._folder.page)
        remember(comparison)
        return comparison
