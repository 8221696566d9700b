"""The plan table, typed: what trains when, at which rate, and what that takes; written to plan.json and read back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, ConfigDict, Field, InstanceOf, TypeAdapter

from llmtune.errors import LlmtuneError
from llmtune.files import read_json
from llmtune.numbers import rate
from llmtune.plan.distances import Distances, read_distances

_BY_DISTANCE = ("rates", "tensors", "parameters")
_FINITE = ConfigDict(allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Size = Annotated[int, Field(ge=1, lt=1 << 63)]
Blocks = Annotated[int, Field(ge=1, lt=1 << 16)]
Rates = Annotated[dict[int, Annotated[float, Field(ge=0)]], Field(min_length=1)]


def _read_set(value: object) -> Any:
    return read_distances(value) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class BaseName:
    """What names a base model: the recipe's name, the revision, and the Hub id where it is known."""

    name: str
    revision: str | None
    hub_id: str | None


@dataclass(frozen=True)
class StageRow:
    """One stage laid over steps `start` to `end`: the distances that train, with rates and counts by distance."""

    start: Count
    end: Count
    until: float
    trains: Annotated[InstanceOf[Distances], BeforeValidator(_read_set)]
    lr: float
    decay: float
    rates: Rates
    tensors: dict[int, Count]
    parameters: dict[int, Count]
    __pydantic_config__: ClassVar[ConfigDict] = _FINITE

    @property
    def trained(self) -> int:
        """Parameters that train at one time."""
        return self.trains.most(self.parameters)

    @property
    def count_tensors(self) -> int:
        """Tensors that train at one time."""
        return self.trains.most(self.tensors)

    @property
    def steps_in_words(self) -> str:
        """The steps, counted from 1: 1-75."""
        return f"{self.start + 1:,}-{self.end:,}"

    @property
    def distances_in_words(self) -> str:
        """The nearest and the farthest distance that has a tensor which trains: 1 .. 30."""
        near, far = min(self.rates), max(self.rates)
        return str(near) if near == far else f"{near} .. {far}"

    @property
    def rates_in_words(self) -> str:
        """The rate at the nearest and at the farthest distance: 1e-3 .. 1e-4, or the one rate of all."""
        top, bottom = (rate(self.rates[end(self.rates)]) for end in (min, max))
        return top if top == bottom else f"{top} .. {bottom}"

    def to_json(self) -> dict[str, Any]:
        """The row as plan.json holds it."""
        by_distance = {key: _text_keys(getattr(self, key)) for key in _BY_DISTANCE}
        return {**asdict(self), **by_distance, "trains": self.trains.to_json(), "trained": self.trained}


@dataclass(frozen=True)
class CacheSize:
    """The boundaries below which outputs of frozen blocks may be cached, and the disk that all of them take."""

    boundaries: list[int]
    bytes_per_token: int
    bytes: int | None = None
    """For all rows; None where they were not tokenized."""


@dataclass(frozen=True)
class PlanTable:
    """What a run trains, stage by stage, and the memory and disk that this takes."""

    base: BaseName
    method: str
    adapter: str
    blocks: Blocks
    parameters: Size
    trained: Count
    """Parameters that train at some step."""
    adapted: dict[str, int]
    """How many layers of each name carry an adapter."""
    quantized: int
    """How many linear layers are in 4 or 8 bits."""
    delta_bytes: int
    states_bytes: int
    """On one device: weights, gradients and states of the optimizer in use, in the stage that holds the most."""
    frozen_blocks: CacheSize
    steps: Count
    stages: Annotated[list[StageRow], Field(min_length=1)]
    notes: list[str]
    in_words: str = ""
    """The method as people call it: LoRA (rank 16)."""
    bits: int | None = None
    """The bits of quantized layers; an older plan.json does not name them, and means 4."""

    def with_tokens(self, tokens: int) -> Self:
        """The table of a run over that many tokens."""
        size = replace(self.frozen_blocks, bytes=tokens * self.frozen_blocks.bytes_per_token)
        return replace(self, frozen_blocks=size)

    def to_json(self) -> dict[str, Any]:
        """The table as plan.json holds it."""
        return {**asdict(self), "stages": [stage.to_json() for stage in self.stages]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The table that `to_json` wrote; raises ValueError or KeyError for one of another version."""
        return TypeAdapter(cls).validate_python(fields)

    @classmethod
    def read(cls, file: Path) -> Self:
        """The table in a plan.json; raises LlmtuneError for one of another version."""
        try:
            return cls.from_json(read_json(file))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LlmtuneError(f"{file}: was written by another version of llmtune; start a new run") from error


def _text_keys(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(distance): value for distance, value in values.items()}
