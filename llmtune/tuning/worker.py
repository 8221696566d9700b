"""`python -m llmtune.tuning.worker FOLDER NUMBER`: trains the trials that a search's folder gives it, one by one."""

import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from llmtune.tuning.files import Folder, TrialFolder, TrialResult

POLL = 0.1
"""Seconds between two looks for the next trial."""


def main(words: list[str]) -> int:
    """Train trials until the search says that there are no more; gives the exit code."""
    folder, worker = Folder(Path(words[0])), int(words[1])
    while True:
        sent = folder.sent(worker)
        if sent is not None and sent["trial"] is None:
            return 0
        trial = folder.trial(int(sent["trial"] or 0)) if sent else None
        if trial is None or trial.result() is not None:
            time.sleep(POLL)
            continue
        with trial.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            trial.end(train(folder.recipe, trial))


def train(recipe: Path, trial: TrialFolder) -> TrialResult:
    """Train one trial; gives what came of it: whatever ends it is a result, in one line."""
    from llmtune.errors import LlmtuneError, TrainingError
    from llmtune.launch.faults import told_in_one_line
    from llmtune.recipe.sections import Recipe
    from llmtune.working import importing

    with importing():
        from llmtune.searching.trial import train_trial
    task = trial.task()
    trial.clear()
    try:
        with told_in_one_line(TrainingError, trial.path):
            settings = Recipe.load(recipe, task["set"])
            outcome = train_trial(settings, trial.run, trial.add, trial.is_stopped, task["validation"])
    except LlmtuneError as error:
        return {"state": "failed", "reason": str(error), "exit_code": error.exit_code}
    return {
        "state": "pruned" if outcome.pruned else "complete",
        "loss": outcome.loss if outcome.curve else None,
        "steps": outcome.steps,
        "total": outcome.total,
        "seconds": round(outcome.seconds, 3),
        "validation": outcome.validation,
    }


if __name__ == "__main__":
    from llmtune.launch.process import serve_command

    serve_command(main)
