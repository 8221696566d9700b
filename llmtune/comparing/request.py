"""What a comparison is asked for, and what it adds to one that is in its folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, cast

from llmtune.arms.arm import Arm
from llmtune.arms.results import titled
from llmtune.comparing.arms import BASELINES
from llmtune.errors import RecipeError, check_word

Equal = Literal["minutes", "epochs"]
MINUTES, SEEDS = 30.0, 2


@dataclass(frozen=True)
class Entrant:
    """An arm at a share of the training rows: what one worker trains."""

    arm: Arm
    size: float

    @property
    def name(self) -> str:
        """The name of its folder: lora, or lora@0.3."""
        return titled(self.arm.name, self.size)

    @property
    def set(self) -> list[str]:
        """The overrides that make the recipe this entrant."""
        return [*self.arm.set, *([f"data.share={self.size!r}"] if self.size != 1 else [])]


@dataclass(frozen=True)
class Request:
    """Arms, the minutes that all of it may take, seeds, shares of the training rows, and baselines."""

    arms: tuple[Arm, ...]
    minutes: float = MINUTES
    seeds: int = SEEDS
    sizes: tuple[float, ...] = (1.0,)
    baselines: tuple[str, ...] = BASELINES
    equal: Equal = "minutes"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The request that `to_json` wrote."""
        arms = tuple(Arm(one["name"], tuple(one["set"])) for one in values["arms"])
        return cls(**{**values, "arms": arms, **{key: tuple(values[key]) for key in ("sizes", "baselines")}})

    def joined(self, new: Self, where: str) -> Self:
        """What both ask for; raises RecipeError for what the folder `where` has in another way, or fewer minutes."""
        before = {arm.name: arm for arm in self.arms}
        changed = next((arm for arm in new.arms if before.get(arm.name, arm) != arm), None)
        if changed is not None:
            there = " ".join(before[changed.name].set) or "nothing"
            message = f"the arm {changed.name} sets {there} there and {' '.join(changed.set) or 'nothing'} here"
            raise RecipeError(f"{where}: holds another comparison ({message}); choose another with --out")
        if new.equal != self.equal:
            raise RecipeError(f"{where}: is equal by {self.equal}; choose another with --out for --equal {new.equal}")
        if new.minutes < self.minutes:
            message = f"was given {self.minutes:g} minutes, and spent minutes do not come back"
            raise RecipeError(f"{where}: {message}; leave --minutes out, or choose another with --out")
        return replace(
            new,
            arms=(*self.arms, *(arm for arm in new.arms if arm.name not in before)),
            seeds=max(self.seeds, new.seeds),
            sizes=tuple(sorted({*self.sizes, *new.sizes})),
            baselines=tuple(name for name in BASELINES if name in (*self.baselines, *new.baselines)),
        )


@dataclass(frozen=True)
class Options:
    """What a user wrote; None where nothing was, which means the default, or what the folder has."""

    minutes: float | None = None
    seeds: int | None = None
    sizes: Sequence[float] | None = None
    baselines: Sequence[str] | None = None
    equal: str | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise RecipeError(f"--minutes {self.minutes:g}: is no time to share out; try 30")
        if self.seeds is not None and not 1 <= self.seeds <= 100:
            raise RecipeError(f"--seeds {self.seeds}: an arm is trained with 1 to 100 seeds; try 2")
        for size in self.sizes or ():
            if not 0 < size <= 1:
                raise RecipeError(f"--sizes {size:g}: is no share of the training rows; try 0.1,0.3,1")
        for name in self.baselines or ():
            check_word("--baselines", name, BASELINES)
        if self.equal is not None:
            check_word("--equal", self.equal, ("minutes", "epochs"))

    def over(self, arms: tuple[Arm, ...], before: Request | None) -> Request:
        """The request of these options: what they leave open is as before, or the default."""
        known = before or Request(arms)
        return Request(
            arms,
            known.minutes if self.minutes is None else float(self.minutes),
            known.seeds if self.seeds is None else self.seeds,
            known.sizes if self.sizes is None else tuple(sorted(set(map(float, self.sizes)))) or known.sizes,
            known.baselines if self.baselines is None else tuple(self.baselines),
            known.equal if self.equal is None else cast(Equal, self.equal),
        )
