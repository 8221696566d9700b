"""Comparisons with known truth: arms that answer a share of the held-out rows right."""

from typing import Any

from llmtune.arms.record import ArmRecord, Baseline, Comparison, Rows, SeedRecord
from llmtune.arms.results import titled
from llmtune.searching.record import SearchRecord, TrialRecord

ROWS = 200


def rows(right: float, n: int = ROWS, start: int = 0) -> Rows:
    """Scores that are 1 on a share `right` of the rows from `start` on, and a loss that falls with it."""
    scores = [float((index - start) % n < round(right * n)) for index in range(n)]
    return {"score": list(scores), "loss": [4.0 - 2 * one for one in scores], "tokens": [2] * n}


def curve(seconds: float, end: float, start: float = 3.0, points: int = 5) -> list[Any]:
    """Validations whose loss falls evenly from `start` to `end`."""
    shares = [index / (points - 1) for index in range(points)]
    return [
        {"step": 1 + round(40 * share), "seconds": seconds * share, "loss": start + share * (end - start)}
        for share in shares
    ]


def arm(name: str, right: list[float] | float, size: float = 1.0, n: int = ROWS, **facts: Any) -> ArmRecord:
    """An arm with a training a share; `seconds`, `peak`, `delta` and `end` (its loss) say what it took."""
    shares = right if isinstance(right, list) else [right]
    seconds, peak, delta = facts.pop("seconds", 100.0), facts.pop("peak", 10**9), facts.pop("delta", 10**7)
    end = facts.pop("end", 1.0)
    seeds: list[SeedRecord] = [
        {
            "seed": seed,
            "run": f"arms/{titled(name, size)}/seed-{seed}",
            "steps": 40,
            "epochs": 1.0,
            "seconds": seconds,
            "peak_bytes": peak,
            "delta_bytes": delta,
            "rows": rows(share, n),
            "curve": curve(seconds, end),
        }
        for seed, share in enumerate(shares)
    ]
    record: ArmRecord = {"name": name, "set": [f"method={name}"], "size": size, "status": "done", "seeds": seeds}
    return {**record, "lr": 1e-3, "minutes": 5.0, "predicted": {"bytes": 1.2e9, "seconds": 90.0}, **facts}  # type: ignore[typeddict-item]


def baseline(name: Any, right: float, size: float = 1.0, n: int = ROWS, **facts: Any) -> Baseline:
    """A baseline that trains nothing."""
    return {"name": name, "status": "done", "size": size, "seconds": 2.0, "rows": rows(right, n), **facts}  # type: ignore[typeddict-item]


def scratch(right: float, size: float = 1.0, **facts: Any) -> Baseline:
    """The same architecture from random weights, trained."""
    return {"name": "scratch", "status": "done", "size": size, "arm": arm("scratch", right, size, **facts)}


def comparison(arms: list[ArmRecord], baselines: list[Baseline] | None = None, **facts: Any) -> Comparison:
    """A comparison of these arms and baselines."""
    known: Comparison = {
        "version": 1,
        "recipe": {"model": {"base": "me/base"}},
        "base": {"name": "me/base", "revision": None, "parameters": 1000},
        "minutes": 30.0,
        "equal": "minutes",
        "seeds": list(range(max((len(one.get("seeds", [])) for one in arms), default=1))),
        "sizes": sorted({one["size"] for one in arms}),
        "metric": "exact_match",
        "higher_is_better": True,
        "held_out": {"n": ROWS, "source": "test.jsonl"},
        "train": {"rows": 1000, "tokens": 20_000, "kind": "labels"},
        "machine": {},
        "baselines": baselines or [],
        "arms": arms,
    }
    return {**known, **facts}  # type: ignore[typeddict-item]


def study() -> SearchRecord:
    """A search over a rate, a rank and an optimizer, of trials that end, are ended early and fail."""
    trials: list[TrialRecord] = []
    for number, (lr, rank, loss) in enumerate([(1e-4, 4, 2.0), (1e-3, 8, 1.0), (3e-3, 8, 1.5), (1e-2, 4, None)]):
        values = {"method.lr": lr, "adapter.r": rank, "train.optimizer": "adamw"}
        trial: TrialRecord = {
            "number": number,
            "values": values,
            "state": "complete" if number < 2 else "pruned" if loss else "failed",
            "loss": loss,
            "seconds": 60.0,
            "steps": 40,
            "curve": curve(60.0, loss) if loss else [],
        }
        trials.append(trial if loss else {**trial, "reason": "the loss is not finite at step 3"})
    return {
        "version": 1,
        "recipe": "recipes/mine.yaml",
        "set": [],
        "base": "me/base",
        "method": "LoRA",
        "over": {"method.lr": "1e-4..1e-2", "adapter.r": "4,8", "train.optimizer": "adamw,adafactor"},
        "log": ["method.lr"],
        "trials": trials,
        "best": 1,
        "importance": {"method.lr": 0.9, "adapter.r": 0.1},
        "seconds": 240.0,
        "winner": "tune/mine/best.yaml",
        "study": "sqlite:///tune/mine/study.db",
        "page": "tune/mine/index.html",
    }
