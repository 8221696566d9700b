"""compare.json of what a comparison's workers left so far, and what follows from it."""

from typing import Any

from llmtune.arms.record import ArmRecord, Baseline, Comparison
from llmtune.arms.saved import seconds_saved
from llmtune.comparing.entrants.measure import rows_of
from llmtune.comparing.folder import Folder
from llmtune.comparing.request import Entrant
from llmtune.errors import LlmtuneError
from llmtune.evaluation.results import FEW_SHOT, TEXTS_COMPARED, Result
from llmtune.files import read_json, write_json
from llmtune.recipe.suite import HELD_OUT
from llmtune.run import Run

VERSION = 1
_HEAD = ("recipe", "base", "metric", "higher_is_better", "held_out", "train", "machine")


def gather(folder: Folder) -> Comparison:
    """The comparison as far as it has come: arms and baselines that ended."""
    request, head = folder.request(), folder.head()
    first = int(head["recipe"]["train"]["seed"])
    entrants = folder.entrants()
    known: dict[str, Any] = {key: head[key] for key in _HEAD}  # type: ignore[literal-required]
    comparison: Comparison = {
        "version": VERSION,
        **known,  # type: ignore[typeddict-item]
        "minutes": request.minutes,
        "equal": request.equal,
        "seeds": list(range(first, first + request.seeds)),
        "sizes": list(request.sizes),
        "baselines": [*_asked_baselines(folder), *_scratch(folder, entrants)],
        "arms": [record for one in entrants if one.arm.name != "scratch" and (record := ended(folder, one))],
    }
    shared = saved(folder)
    return {**comparison, "saved": shared} if shared else comparison


def write(folder: Folder) -> Comparison:
    """Write compare.json as far as the comparison has come."""
    comparison = gather(folder)
    write_json(folder.compare_file, comparison)
    return comparison


def ended(folder: Folder, entrant: Entrant) -> ArmRecord | None:
    """The record of an entrant that ended, with what was predicted of its arm; None of one that did not."""
    reason = folder.head()["skipped"].get(entrant.arm.name)
    arm = entrant.arm
    if reason is not None:
        return {"name": arm.name, "set": list(arm.set), "size": entrant.size, "status": "skipped", "reason": reason}
    record = folder.record(entrant.name)
    if record is None or record["status"] == "running":
        return None
    predicted = folder.head()["predicted"].get(arm.name)
    return {**record, "predicted": predicted} if predicted else record


def _scratch(folder: Folder, entrants: list[Entrant]) -> list[Baseline]:
    baselines: list[Baseline] = []
    for entrant in entrants:
        record = ended(folder, entrant) if entrant.arm.name == "scratch" else None
        if record is None:
            continue
        baseline: Baseline = {"name": "scratch", "status": record["status"], "size": entrant.size, "arm": record}  # type: ignore[typeddict-item]
        baseline["seconds"] = 60 * record.get("minutes", 0.0)
        if "reason" in record:
            baseline["reason"] = record["reason"]
        baselines.append(baseline)
    return baselines


def _asked_baselines(folder: Folder) -> list[Baseline]:
    """The baselines that were run, and the untrained base's answers where an arm's evaluation asked it."""
    stored = folder.baselines()
    names = {one["name"] for one in stored}
    wanted = [name for name in folder.request().baselines if name in ("zero-shot", "few-shot") and name not in names]
    return [*(of_base(folder, name) for name in wanted if _evaluated(folder)), *stored]


def _evaluated(folder: Folder) -> Any:
    """An evaluation's file of the base, of any run here; None before there is one."""
    return next(iter(sorted(folder.path.glob("arms/*/seed-*/eval/base.json"))), None)


def of_base(folder: Folder, name: str) -> Baseline:
    """What the base reaches untrained, as an arm's evaluation asked it."""
    size = max(folder.request().sizes)
    file = next(
        one for one in sorted(folder.path.glob("arms/*/seed-*/eval/base.json")) if "scratch" not in one.parts[-4]
    )
    results = read_json(file)["results"]
    if name == "few-shot":
        if FEW_SHOT not in results:
            return {"name": "few-shot", "status": "skipped", "reason": without_examples(results), "size": size}
        results = {HELD_OUT: results[FEW_SHOT]}
    try:
        rows = rows_of(results, folder.head()["metric"])
    except LlmtuneError as error:
        return {"name": name, "status": "skipped", "reason": str(error), "size": size}  # type: ignore[typeddict-item]
    return {"name": name, "status": "done", "size": size, "rows": rows}  # type: ignore[typeddict-item]


def without_examples(results: dict[str, Result]) -> str:
    """Why the base was asked without worked examples, by what was asked."""
    texts = all(result.get("compared") == TEXTS_COMPARED for result in results.values())
    return "held-out rows are plain texts" if texts else "no worked example fits beside a question"


def saved(folder: Folder) -> dict[str, float]:
    """Seconds that arms did not spend, since what they share was there, by what it was."""
    total: dict[str, float] = {}
    for file in folder.path.glob("arms/*/seed-*/manifest.json"):
        for what, seconds in seconds_saved(Run(file.parent)).items():
            total[what] = total.get(what, 0.0) + seconds
    return total
