"""What compare.json holds: the shape of a comparison, which commands, pages and tests read."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

Status = Literal["done", "failed", "skipped", "running"]


class Rows(TypedDict):
    """Scores on the held-out rows, row by row, in the rows' order."""

    score: list[float | None]
    """The metric that decides."""
    loss: list[float | None]
    """Nats of each row's answer tokens together."""
    tokens: list[int]
    """Answer tokens of each row."""


class Point(TypedDict):
    """A validation while an arm trained."""

    step: int
    seconds: float
    """Since its training began, without start-up."""
    loss: float


class Try(TypedDict):
    """A learning rate that was tried."""

    lr: float | list[float]
    """The rate at the output, one a stage where the method has several."""
    factor: float
    """That rate as a multiple of the default one."""
    steps: int
    seconds: float
    loss: float | None
    """Validation loss at its end; None where it failed or is not finite."""
    state: Literal["complete", "pruned", "failed"]
    reason: NotRequired[str]


class SeedRecord(TypedDict):
    """An arm trained to its end with one seed, and evaluated."""

    seed: int
    run: str
    """The run's folder, from the comparison's."""
    steps: int
    epochs: float
    seconds: float
    """Training, without start-up and evaluation."""
    peak_bytes: int | None
    """The most memory that the training took: of a card, or over what its process held before it loaded the base."""
    delta_bytes: int
    rows: Rows
    curve: list[Point]
    general: NotRequired[dict[str, float | None]]
    """What the training cost: general questions and texts, tuned minus base, by metric."""


class ArmFacts(TypedDict, total=False):
    """What an arm reached so far."""

    reason: str
    """Why it failed or was skipped, in one line."""
    limited: str
    """What ended its training before its minutes were over, in words."""
    trains: float | None
    """The seconds that each seed was given to train in; None for equal epochs."""
    steps: int
    """The steps that each seed trains."""
    method: str
    """The method in words."""
    plan: dict[str, Any]
    """The plan table."""
    predicted: dict[str, float | None]
    """Bytes of memory and seconds of training: `bytes`, `seconds`."""
    minutes: float
    """All that it took: search, training with every seed, evaluation."""
    search: list[Try]
    lr: float | list[float]
    """The rate that the search chose."""
    seeds: list[SeedRecord]


class ArmRecord(ArmFacts):
    """An arm, from what it is to what it reached."""

    name: str
    set: list[str]
    size: float
    """The share of the training rows that it saw."""
    status: Status
    """running in arm.json alone: compare.json has what ended."""


class Baseline(TypedDict):
    """What is reached without the training of the recipe's base."""

    name: Literal["zero-shot", "few-shot", "scratch", "tf-idf"]
    status: Literal["done", "failed", "skipped"]
    reason: NotRequired[str]
    size: float
    """The share of the training rows that it saw."""
    seconds: NotRequired[float]
    rows: NotRequired[Rows]
    """Without losses and tokens where a baseline gives labels alone."""
    arm: NotRequired[ArmRecord]
    """How a baseline that trains was trained."""


class Comparison(TypedDict):
    """A comparison: what was asked, and every arm and baseline."""

    version: int
    recipe: dict[str, Any]
    """Every value of the recipe that the arms override."""
    base: dict[str, Any]
    """Name, revision, parameters."""
    minutes: float
    equal: Literal["minutes", "epochs"]
    seeds: list[int]
    sizes: list[float]
    metric: str
    """The metric of held-out rows that decides, such as exact_match; loss where rows are plain texts."""
    higher_is_better: bool
    held_out: dict[str, Any]
    """`n` rows, their `source`."""
    train: dict[str, Any]
    """`rows`, `tokens`, and `kind` of the data: labels, json or text."""
    machine: dict[str, Any]
    baselines: list[Baseline]
    arms: list[ArmRecord]
    saved: NotRequired[dict[str, float]]
    """Seconds that sharing saved, by what was shared."""
    verdict: NotRequired[Mapping[str, Any]]
    """What the numbers say: a Verdict of arms/verdict.py."""
