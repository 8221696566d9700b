"""An arm: a recipe under some overrides, by a name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """A name, and the `a.b=c` overrides that make the recipe that arm."""

    name: str
    set: tuple[str, ...]


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("full", ("method=full",)),
        Arm("frozen", ("method=frozen",)),
        Arm("gradual", ("method=gradual",)),
        Arm("discriminative", ("method=discriminative",)),
        Arm("ulmfit", ("method={kind: gradual, bottom_ratio: 0.1}",)),
        Arm("lisa", ("method=lisa",)),
        Arm("lora", ("method=lora",)),
        Arm("lora-top", ("method={kind: frozen, adapter: {kind: lora}}",)),
        Arm("qlora", ("method=qlora",)),
        Arm("dora", ("method=dora",)),
        Arm("bottleneck", ("method=bottleneck",)),
        Arm("ia3", ("method=ia3",)),
        Arm("vera", ("method=vera",)),
    )
}
"""The arms that have a name of their own."""
