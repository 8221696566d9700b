"""What arms and baselines reached, out of a comparison: samples of scores and losses, costs, curves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmtune.arms.record import ArmRecord, Baseline, Comparison, Point, Rows, SeedRecord
from llmtune.arms.scores import Sample, sample

LOSS = "loss"


@dataclass(frozen=True)
class Result:
    """An arm or a baseline at a size, with at least one set of scores."""

    name: str
    size: float
    is_arm: bool
    scores: Sample
    losses: Sample | None
    """Nats of each row with its tokens as weight; None where a loss is not finite or was not measured."""
    seconds: float | None
    """Of one training, the mean of all; of a baseline that trains nothing, all that it took."""
    peak_bytes: int | None = None
    delta_bytes: int | None = None
    curves: Sequence[Sequence[Point]] = field(default_factory=tuple)

    @property
    def title(self) -> str:
        """The name, with the size where that is a part of the rows: lora@0.3."""
        return titled(self.name, self.size)


def titled(name: str, size: float) -> str:
    """Name an arm at a size, as its folder is named."""
    return name if size == 1 else f"{name}@{size:g}"


def arm_results(comparison: Comparison) -> list[Result]:
    """Return what each arm reached that finished a training; others have nothing to compare."""
    results = (arm_result(arm, comparison["metric"]) for arm in comparison["arms"])
    return [result for result in results if result]


def arm_result(arm: ArmRecord, metric: str) -> Result | None:
    """Return what an arm reached by a metric; None where it finished no training, or was not scored."""
    return _trained(arm["name"], arm, metric, is_arm=True)


def baseline_results(comparison: Comparison) -> list[Result]:
    """Return what each baseline reached that was measured."""
    results = (_baseline(one, comparison["metric"]) for one in comparison["baselines"])
    return [result for result in results if result]


def _baseline(one: Baseline, metric: str) -> Result | None:
    if one["status"] != "done":
        return None
    if "arm" in one:
        return _trained(one["name"], {**one["arm"], "size": one["size"]}, metric, is_arm=False)
    if "rows" not in one:
        return None
    samples = _samples([one["rows"]], metric, is_trained=False)
    return Result(one["name"], one["size"], False, *samples, one.get("seconds")) if samples else None


def _trained(name: str, arm: ArmRecord, metric: str, is_arm: bool) -> Result | None:
    seeds = arm.get("seeds", [])
    if arm["status"] != "done" or not seeds:
        return None
    samples = _samples([seed["rows"] for seed in seeds], metric, is_trained=True)
    if samples is None:
        return None
    return Result(
        name,
        arm["size"],
        is_arm,
        *samples,
        seconds=sum(seed["seconds"] for seed in seeds) / len(seeds),
        peak_bytes=max((seed["peak_bytes"] for seed in seeds if seed["peak_bytes"] is not None), default=None),
        delta_bytes=max(seed["delta_bytes"] for seed in seeds),
        curves=[seed["curve"] for seed in seeds],
    )


def _samples(rows: Sequence[Rows], metric: str, is_trained: bool) -> tuple[Sample, Sample | None] | None:
    """Return scores and losses; None where the metric that decides was not measured."""
    losses = _losses(rows, is_trained)
    if metric == LOSS:
        return None if losses is None else (losses, losses)
    if not all(one["score"] for one in rows):
        return None
    return sample([one["score"] for one in rows], is_trained=is_trained), losses


def _losses(rows: Sequence[Rows], is_trained: bool) -> Sample | None:
    if not all(one["loss"] and len(one["tokens"]) == len(one["loss"]) for one in rows):
        return None
    known = sample([one["loss"] for one in rows], rows[0]["tokens"], is_trained=is_trained)
    return known if known.scored[known.weights > 0].all() else None


def at_size(results: Iterable[Result], size: float) -> list[Result]:
    """Return the results at one size."""
    return [result for result in results if result.size == size]


def general(seeds: Sequence[SeedRecord]) -> dict[str, float]:
    """Return what the training cost on general questions and texts, the mean over seeds, by metric."""
    names = dict.fromkeys(name for seed in seeds for name in seed.get("general", {}))
    values = {name: [seed.get("general", {}).get(name) for seed in seeds] for name in names}
    known = {name: [one for one in some if one is not None] for name, some in values.items()}
    return {name: sum(some) / len(some) for name, some in known.items() if some}
