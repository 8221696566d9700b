"""What sharing saved an arm's run."""

from llmtune.run import Run


def seconds_saved(run: Run) -> dict[str, float]:
    """Return the seconds that a finished evaluation did not take, by what was shared; empty where nothing was."""
    answers = run.manifest().get("steps", {}).get("eval", {}).get("base_answers") or {}
    seconds = sum(answers.get("reused", {}).values())
    return {"base answers": seconds} if seconds else {}
