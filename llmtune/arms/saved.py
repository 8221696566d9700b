"""What sharing saved an arm's run."""

from llmtune.run import Run


def seconds_saved(run: Run) -> dict[str, float]:
    """Return the seconds that a finished evaluation did not take, by what was shared; empty where nothing was."""
    seconds = sum(_seconds(run, "reused").values())
    return {"base answers": seconds} if seconds else {}


def seconds_asked(run: Run) -> dict[str, float]:
    """Return the seconds in which a finished evaluation asked the untrained base, by the part that was asked."""
    return _seconds(run, "asked")


def _seconds(run: Run, how: str) -> dict[str, float]:
    answers = run.manifest().get("steps", {}).get("eval", {}).get("base_answers") or {}
    return dict(answers.get(how, {}))
