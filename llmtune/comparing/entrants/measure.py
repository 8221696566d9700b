"""What a trained and evaluated run of an arm reached, as compare.json has it."""

from typing import Any

from llmtune.arms.record import Point, Rows, SeedRecord
from llmtune.errors import ProofError
from llmtune.evaluation.results import GENERAL_QUESTIONS, GENERAL_TEXTS, TEXTS, Result
from llmtune.files import read_json
from llmtune.recipe.suite import HELD_OUT
from llmtune.run import Run
from llmtune.run_log import Record, read_log

LOSS = "loss"


def seed_record(run: Run, name: str, seed: int, metric: str, steps_per_epoch: int) -> SeedRecord:
    """The record of a run that is trained and evaluated; `name` is its folder from the comparison's."""
    log = read_log(run.log_file)
    last = next(record for record in reversed(log) if "loss" in record)
    tuned = read_json(run.eval / "tuned.json")
    record: SeedRecord = {
        "seed": seed,
        "run": name,
        "steps": last["step"],
        "epochs": round(last["step"] / steps_per_epoch, 4),
        "seconds": round(last["seconds"], 3),
        "peak_bytes": peak_bytes(log),
        "delta_bytes": sum(file.stat().st_size for file in run.delta.glob("*.safetensors")),
        "rows": rows_of(tuned["results"], metric),
        "curve": curve(log),
    }
    general = general_of(tuned)
    return {**record, "general": general} if general else record


def rows_of(results: dict[str, Result], metric: str) -> Rows:
    """Scores, losses and tokens of the held-out rows; raises ProofError where they were not scored by the metric."""
    result = results.get(HELD_OUT) or results.get(TEXTS)
    if result is None or metric not in result["scores"]:
        raise ProofError(f"the held-out rows were not scored by {metric}")
    losses = result["scores"].get(LOSS, [])
    return {"score": list(result["scores"][metric]), "loss": list(losses), "tokens": list(result.get("tokens", []))}


def curve(log: list[Record]) -> list[Point]:
    """The validations of a log."""
    points: list[Point] = []
    seconds = 0.0
    for record in log:
        seconds = record.get("seconds", seconds)
        if record.get("eval_loss") is not None:
            points.append({"step": record["step"], "seconds": round(seconds, 3), "loss": record["eval_loss"]})
    return points


def peak_bytes(log: list[Record]) -> int | None:
    """The most memory that a stage took, as it is predicted: a card's, or over what the process held before."""
    measured = [record for record in log if "memory" in record]
    peaks = [record.get("allocated") or record.get("resident") for record in measured]
    return max((int(peak) for peak in peaks if peak), default=None)


def general_of(tuned: dict[str, Any]) -> dict[str, float | None]:
    """What the training cost on general questions and texts, tuned minus base, by task and metric."""
    differences = tuned.get("differences", {}).get("base, zero-shot", {})
    return {
        f"{task}.{metric}": one["difference"]
        for task in (GENERAL_QUESTIONS, GENERAL_TEXTS)
        for metric, one in differences.get(task, {}).items()
    }
