"""Sets of distances from the output: what a stage trains.

Distance counts from the output: head and final norm 0, last block 1, ..., first block L, embeddings L+1.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, ClassVar, Self

from pydantic import TypeAdapter

from llmtune.errors import PlanError


class Distances(ABC):
    """A set of distances; a set that is drawn anew holds every distance that it may ever draw."""

    kind: ClassVar[str]
    redrawn: ClassVar[bool] = False
    """Whether the set changes from step to step."""

    @abstractmethod
    def __contains__(self, distance: int) -> bool:
        """Whether this distance ever trains."""

    @abstractmethod
    def farthest(self, blocks: int) -> int:
        """The farthest distance in a model of that many blocks."""

    @abstractmethod
    def words(self, blocks: int) -> str:
        """What trains in a model of that many blocks, for tables and pages."""

    def at(self, step: int, seed: int) -> "Distances":
        """The set that trains at a step (0-based)."""
        return self

    def changes(self, start: int, end: int) -> Iterable[int]:
        """The steps from `start` to before `end` at which another set may begin."""
        return (start,)

    def limited_to(self, distances: Collection[int]) -> "Distances":
        """The same set where only these distances have something that can train; raises PlanError for too few."""
        return self

    def most(self, values: Mapping[int, int]) -> int:
        """The largest sum of values by distance that trains at one time."""
        return sum(value for distance, value in values.items() if distance in self)

    def deepest(self, distances: Collection[int]) -> set[int]:
        """Those of `distances` that train at one time; of sets drawn anew, the one that reaches farthest."""
        return {distance for distance in distances if distance in self}

    def share(self, blocks: int) -> float:
        """The share of that many blocks that ever trains."""
        return sum(distance in self for distance in range(1, blocks + 1)) / blocks

    def to_json(self) -> dict[str, Any]:
        """The set as JSON holds it: its kind and its fields."""
        fields = {key: sorted(one) if isinstance(one, frozenset) else one for key, one in asdict(self).items()}  # type: ignore[call-overload]
        return {"kind": self.kind, **fields}

    @classmethod
    def _read(cls, fields: dict[str, Any]) -> Self:
        return TypeAdapter(cls).validate_python(fields)


@dataclass(frozen=True)
class Everything(Distances):
    """Every distance."""

    kind = "everything"

    def __contains__(self, distance: int) -> bool:
        return True

    def farthest(self, blocks: int) -> int:
        return blocks + 1

    def words(self, blocks: int) -> str:
        return "all layers"


@dataclass(frozen=True)
class Top(Distances):
    """The head and the last `reach` blocks: distances 0 to `reach`."""

    reach: int
    kind = "top"

    def __post_init__(self) -> None:
        if self.reach < 0:
            raise ValueError(f"a stage that reaches {self.reach} trains nothing; try a reach of 0")

    def __contains__(self, distance: int) -> bool:
        return distance <= self.reach

    def farthest(self, blocks: int) -> int:
        return self.reach

    def words(self, blocks: int) -> str:
        if self.reach > blocks:
            return "all layers"
        return {0: "head and final norm", 1: "the last block"}.get(self.reach, f"the last {self.reach} blocks")


@dataclass(frozen=True)
class Band(Distances):
    """The distances from `first` to `last`, below a top that stays frozen."""

    first: int
    last: int
    kind = "band"

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise ValueError(f"a band from distance {self.first} to {self.last} trains nothing; try 1 to {self.last}")

    def __contains__(self, distance: int) -> bool:
        return self.first <= distance <= self.last

    def farthest(self, blocks: int) -> int:
        return self.last

    def words(self, blocks: int) -> str:
        if self.first > blocks:
            return "embeddings"
        inside = range(self.first, min(self.last, blocks) + 1)
        named = f"the block at distance {self.first}" if len(inside) == 1 else f"blocks at distances {spans(inside)}"
        return f"{named}, embeddings" if self.last > blocks else named


@dataclass(frozen=True)
class Chosen(Distances):
    """Just these distances."""

    distances: frozenset[int]
    kind = "chosen"

    def __contains__(self, distance: int) -> bool:
        return distance in self.distances

    def farthest(self, blocks: int) -> int:
        return max(self.distances)

    def words(self, blocks: int) -> str:
        return f"distances {spans(sorted(self.distances))}"


@dataclass(frozen=True)
class Drawn(Distances):
    """`always`, and `count` distances drawn from `among` anew every `every` steps, as seed and step alone decide."""

    count: int
    every: int
    among: frozenset[int]
    always: frozenset[int]
    kind = "drawn"
    redrawn = True

    def __contains__(self, distance: int) -> bool:
        return distance in self.among or distance in self.always

    def farthest(self, blocks: int) -> int:
        return max(self.among | self.always)

    def words(self, blocks: int) -> str:
        steps = "step" if self.every == 1 else f"{self.every} steps"
        return f"{self.count} of {len(self.among)} blocks, drawn anew every {steps}"

    def at(self, step: int, seed: int) -> Chosen:
        return Chosen(self.always | _draw(self.among, self.count, seed, step // self.every))

    def changes(self, start: int, end: int) -> Iterable[int]:
        return (start, *range((start // self.every + 1) * self.every, end, self.every))

    def limited_to(self, distances: Collection[int]) -> "Drawn":
        among = self.among & frozenset(distances)
        if len(among) < self.count:
            message = f"draws {self.count} blocks, and the adapter is in {len(among)}; try {max(1, len(among))}"
            raise PlanError("blocks", message)
        return replace(self, among=among)

    def most(self, values: Mapping[int, int]) -> int:
        steady = sum(value for distance, value in values.items() if distance in self.always)
        drawn = sorted((value for distance, value in values.items() if distance in self.among), reverse=True)
        return steady + sum(drawn[: self.count])

    def deepest(self, distances: Collection[int]) -> set[int]:
        drawn = sorted(distance for distance in distances if distance in self.among)[-self.count :]
        return {distance for distance in distances if distance in self.always} | set(drawn)


@lru_cache(maxsize=64)
def _draw(among: frozenset[int], count: int, seed: int, number: int) -> frozenset[int]:
    """The distances of the draw of that number: those whose hashes with seed and number are lowest."""
    order = sorted(among, key=lambda distance: hashlib.sha256(f"{seed} {number} {distance}".encode()).digest())
    return frozenset(order[:count])


_KINDS: dict[str, type[Distances]] = {one.kind: one for one in (Everything, Top, Band, Chosen, Drawn)}


def read_distances(fields: Mapping[str, Any]) -> Distances:
    """The set that `to_json` wrote; raises ValueError or KeyError for one of another version."""
    return _KINDS[fields["kind"]]._read({key: value for key, value in fields.items() if key != "kind"})


def spans(distances: Iterable[int]) -> str:
    """Growing distances as 0, 1 to 30, 31."""
    runs = [[one for _, one in run] for _, run in groupby(enumerate(distances), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
