"""Methods and adapters as a recipe names them; a method gives the plan, an adapter says what the parameters are."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llmtune.plan import Plan, Stage, decay_for


class Closed(BaseModel):
    """A recipe section: unknown keys are errors, values are never coerced, nothing changes after validation."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of a model: transformer blocks, hidden size, parameters."""

    blocks: int
    hidden: int
    parameters: int


class PlanError(ValueError):
    """A method that the model cannot follow; `key` is the recipe key under `method` that says so."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Reach = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] | Literal["all"]
Decay = Annotated[float, Field(gt=0, le=1.5)]

# The adapter's place in the table of rates: parameters of the model -> rate at the output (docs/methods.md gives the sources).
_SIZES = (135e6, 1e9, 8e9, 70e9)
_FULL = (1e-4, 3e-5, 1e-5, 5e-6)
_LORA = (1e-3, 5e-4, 3e-4, 2e-4)
_IA3 = (5e-3, 5e-3, 5e-3, 3e-3)
_BOTTLENECK = (1e-3, 5e-4, 3e-4, 1e-4)
_INIT_FACTOR = {"pissa": 1 / 10, "olora": 1 / 18}


def _by_size(parameters: int, rates: tuple[float, ...]) -> float:
    """The rate for a model of that many parameters, interpolated in logarithms and flat outside the table, to two digits."""
    position = math.log(min(max(parameters, _SIZES[0]), _SIZES[-1]))
    for low, high, below, above in zip(_SIZES, _SIZES[1:], rates, rates[1:], strict=False):
        if position <= math.log(high) + 1e-12:
            share = (position - math.log(low)) / (math.log(high) - math.log(low))
            return float(f"{below ** (1 - share) * above**share:.1e}")
    return rates[-1]


class NoAdapter(Closed):
    """The model's own parameters are trained."""

    kind: Literal["none"] = "none"
    """No adapter."""

    def default_rate(self, facts: Facts, share: float) -> float:
        """The rate at the output where `share` of the blocks trains: ten times the full rate for the head alone."""
        return float(f"{_by_size(facts.parameters, _FULL) * 10 ** (1 - share):.1e}")


class Lora(Closed):
    """Low-rank updates beside linear layers (Hu 2021)."""

    kind: Literal["lora"]
    """Low-rank adapter."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update; 16 is near the knee."""
    alpha: Positive = 32
    """Scale of the update; the rate that matters is lr x alpha."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = (
        "all-linear"
    )
    """Module names to adapt, or all-linear: every linear layer but the head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank."""
    dora: bool = False
    """Learn magnitude and direction apart (DoRA)."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """How A and B start."""

    @property
    def effective_alpha(self) -> float:
        """The alpha of a plain LoRA of the same rank with the same scale."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    def default_rate(self, facts: Facts, share: float) -> float:
        """The rate at alpha 32 for the model's size, carried over to this alpha and initialisation."""
        rate = _by_size(facts.parameters, _LORA) * 32 / self.effective_alpha * _INIT_FACTOR.get(self.init, 1.0)
        return float(f"{rate:.1e}")


class Ia3(Closed):
    """Learned rescaling of keys, values and feed-forward activations (Liu 2022)."""

    kind: Literal["ia3"]
    """Rescaling vectors."""
    targets: Literal["auto"] | Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = "auto"
    """Module names to rescale, or auto: what PEFT knows of the architecture."""

    def default_rate(self, facts: Facts, share: float) -> float:
        """The rate for the model's size."""
        return _by_size(facts.parameters, _IA3)


class Bottleneck(Closed):
    """A narrow MLP beside or behind each block's own (Houlsby 2019, He 2021)."""

    kind: Literal["bottleneck"]
    """Bottleneck adapter."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Width; hidden size / 16 where not given."""
    form: Literal["parallel", "sequential"] = "parallel"
    """parallel: the MLP's own form, merges exactly into a wider MLP; sequential: behind the MLP, cannot be merged."""

    def default_rate(self, facts: Facts, share: float) -> float:
        """The rate for the model's size."""
        return _by_size(facts.parameters, _BOTTLENECK)


def _adapter(value: object) -> object:
    return {"kind": "none"} if value in (None, "none") else value


Adapter = Annotated[NoAdapter | Lora | Ia3 | Bottleneck, Field(discriminator="kind"), BeforeValidator(_adapter)]


def _resolve_reach(reach: float | str, facts: Facts, key: str) -> int | None:
    """A reach in blocks, None for all; a fraction is a share of the blocks."""
    if isinstance(reach, str):
        return None
    if isinstance(reach, float):
        return math.ceil(reach * facts.blocks)
    if reach > facts.blocks + 1:
        raise PlanError(
            key,
            f"reach {reach} is beyond the model, which has {facts.blocks} blocks; the nearest valid reach is {facts.blocks} or all",
        )
    return None if reach == facts.blocks + 1 else reach


class _Method(Closed):
    """What every method has."""

    adapter: Adapter = NoAdapter()
    """The adapter whose parameters the plan trains; none trains the model's own."""

    @abstractmethod
    def plan(self, facts: Facts) -> Plan:
        """The plan for a model with these facts; raises PlanError where the model cannot follow."""

    def _stage(self, facts: Facts, until: float, reach: int | None, lr: float | None, decay: float) -> Stage:
        share = 1.0 if reach is None else min(reach, facts.blocks) / facts.blocks
        return Stage(until, reach, lr or self.adapter.default_rate(facts, share), decay)


class _Decaying(_Method):
    """A method whose rate falls with the distance from the output."""

    decay: Decay | None = None
    """Factor on the rate per block away from the output."""
    bottom_ratio: Fraction | None = None
    """The first block's rate as a share of the last one's; moves between model sizes, unlike decay."""

    @model_validator(mode="after")
    def _one_of(self) -> "_Decaying":
        if self.decay is not None and self.bottom_ratio is not None:
            raise ValueError("give decay or bottom_ratio, not both")
        return self

    def _factor(self, facts: Facts) -> float:
        if self.bottom_ratio is not None:
            return decay_for(self.bottom_ratio, facts.blocks)
        return 1.0 if self.decay is None else self.decay


class Full(_Method):
    """Every layer adapts at one rate."""

    kind: Literal["full"]
    """Full: (1, all, 1)."""
    lr: Positive | None = None
    """Learning rate; chosen by adapter and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that reaches everything."""
        return Plan((self._stage(facts, 1.0, None, self.lr, 1.0),))


class Frozen(_Decaying):
    """Frozen extractor: the low layers stay, the top adapts."""

    kind: Literal["frozen"]
    """Frozen extractor: (1, reach, decay)."""
    reach: Reach = 0.5
    """Farthest block from the output that trains (0: the final norm and an untied head), or a share of the blocks."""
    lr: Positive | None = None
    """Learning rate at the output; chosen by adapter, reach and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that reaches the top only."""
        reach = _resolve_reach(self.reach, facts, "reach")
        return Plan((self._stage(facts, 1.0, reach, self.lr, self._factor(facts)),))


class Discriminative(_Decaying):
    """Every layer adapts, the lower ones more slowly."""

    kind: Literal["discriminative"]
    """Discriminative rates: (1, all, decay)."""
    lr: Positive | None = None
    """Learning rate at the output; chosen by adapter and model size where not given."""

    def plan(self, facts: Facts) -> Plan:
        """One stage that reaches everything at falling rates; bottom_ratio 0.1 where neither factor is given."""
        decay = (
            decay_for(0.1, facts.blocks) if self.decay is None and self.bottom_ratio is None else self._factor(facts)
        )
        return Plan((self._stage(facts, 1.0, None, self.lr, decay),))


class Gradual(_Decaying):
    """Gradual unfreezing: the top first, then the middle, then the bottom."""

    kind: Literal["gradual"]
    """Gradual unfreezing: one stage per reach."""
    reaches: Annotated[tuple[Reach, ...], BeforeValidator(_listed), Field(min_length=2)] = (0.15, 0.5, "all")
    """How far each stage reaches, growing."""
    until: Annotated[tuple[Fraction, ...], BeforeValidator(_listed)] | None = None
    """Where each stage ends, as fractions of training; equal spans where not given."""
    lr: Positive | Annotated[tuple[Positive, ...], BeforeValidator(_listed)] | None = None
    """Rate at the output, one for all stages or one a stage; chosen by adapter, reach and model size where not given."""

    @model_validator(mode="after")
    def _lengths(self) -> "Gradual":
        for name, value in (("until", self.until), ("lr", self.lr)):
            if isinstance(value, tuple) and len(value) != len(self.reaches):
                raise ValueError(f"{name} gives {len(value)} values for {len(self.reaches)} reaches; give one a stage")
        return self

    def plan(self, facts: Facts) -> Plan:
        """One stage per reach, each reaching farther than the one before."""
        reaches = [_resolve_reach(reach, facts, "reaches") for reach in self.reaches]
        sizes = [facts.blocks + 1 if reach is None else reach for reach in reaches]
        if sizes != sorted(set(sizes)):
            raise PlanError(
                "reaches",
                f"each stage reaches farther than the one before, not {list(self.reaches)} (in this model {sizes})",
            )
        count = len(reaches)
        ends = self.until or tuple((index + 1) / count for index in range(count))
        rates = self.lr if isinstance(self.lr, tuple) else (self.lr,) * count
        decay = self._factor(facts)
        stages = (
            self._stage(facts, end, reach, lr, decay) for end, reach, lr in zip(ends, reaches, rates, strict=True)
        )
        return _ordered("until", stages)


class StageSpec(Closed):
    """One stage of a staged method."""

    until: Fraction
    """Where it ends, as a fraction of training; the last ends at 1."""
    reach: Reach = "all"
    """Farthest block from the output that trains."""
    lr: Positive | None = None
    """Rate at the output; chosen by adapter, reach and model size where not given."""
    decay: Decay | None = None
    """Factor on the rate per block away from the output."""
    bottom_ratio: Fraction | None = None
    """The first block's rate as a share of the last one's."""


class Staged(_Method):
    """Stages written out one by one."""

    kind: Literal["staged"]
    """Any stages."""
    stages: Annotated[tuple[StageSpec, ...], BeforeValidator(_listed), Field(min_length=1)]
    """The stages in order."""

    def plan(self, facts: Facts) -> Plan:
        """The stages as written."""
        return _ordered("stages", (self._one(facts, index, spec) for index, spec in enumerate(self.stages)))

    def _one(self, facts: Facts, index: int, spec: StageSpec) -> Stage:
        if spec.decay is not None and spec.bottom_ratio is not None:
            raise PlanError(f"stages.{index}", "give decay or bottom_ratio, not both")
        decay = decay_for(spec.bottom_ratio, facts.blocks) if spec.bottom_ratio else spec.decay or 1.0
        return self._stage(
            facts, spec.until, _resolve_reach(spec.reach, facts, f"stages.{index}.reach"), spec.lr, decay
        )


def _ordered(key: str, stages: "list[Stage] | tuple[Stage, ...] | object") -> Plan:
    listed = tuple(stages)  # type: ignore[arg-type,var-annotated]
    try:
        return Plan(listed)
    except ValueError as error:
        raise PlanError(key, str(error)) from error


Method = Annotated[Full | Frozen | Gradual | Discriminative | Staged, Field(discriminator="kind")]
METHODS = ("full", "frozen", "gradual", "discriminative", "staged")


def rate_notes(adapter: NoAdapter | Lora | Ia3 | Bottleneck, lr: float) -> list[str]:
    """What a run's header says of its rate: the rate carried to alpha 32, and a warning where runs are known to diverge."""
    if not isinstance(adapter, Lora):
        return []
    at_32 = lr * adapter.effective_alpha / 32
    notes = [f"lr_at_alpha_32 {at_32:.2g}"]
    if at_32 >= 3e-3:
        notes.append("warning: runs at lr_at_alpha_32 >= 3e-3 are known to diverge; 3e-4 to 1e-3 is the usual range")
    elif not 1e-4 <= at_32 <= 1e-3 * 1.05:
        notes.append("warning: lr_at_alpha_32 is outside 1e-4..1e-3, where published optima lie")
    return notes
