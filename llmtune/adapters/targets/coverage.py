"""What a plan leaves as it is, though everything was to train or to be adapted: counted, and with the reason."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from llmtune.adapters.insert import adapted_names
from llmtune.adapters.targets.adaptable import ROUTER, linear_layers
from llmtune.adapters.targets.experts import expert_obstacle, expert_tensors, routers
from llmtune.model.blocks import blocks, distances

LEFT_OUT = "left as it is by this adapter"


@dataclass(frozen=True)
class Coverage:
    """Which of the linear layers inside the blocks that train an adapter goes to; a tensor of experts is one."""

    adapted: list[str]
    left: dict[str, str]
    """The other ones by name, and why."""

    @property
    def words(self) -> str:
        """One line that counts both."""
        total = len(self.adapted) + len(self.left)
        kinds = Counter((_in_block(name), reason) for name, reason in self.left.items())
        parts = [f"{count} x {name} ({reason})" for (name, reason), count in sorted(kinds.items())]
        return f"adapts {len(self.adapted)} of {total} linear layers; leaves {len(self.left)}: {', '.join(parts)}"


def coverage(model: nn.Module, tuned: nn.Module) -> Coverage:
    """Compare the linear layers, routers and tensors of experts of `model` with what is adapted in `tuned`.

    Blocks in which nothing is adapted do not count: the plan never trains them, or the recipe leaves them out.
    """
    adapted = set(adapted_names(tuned))
    reasons = linear_layers(model) | dict.fromkeys(routers(model), ROUTER)
    reasons |= {name.removesuffix(".weight"): expert_obstacle(model, name) for name in expert_tensors(model)}
    names = {id(module): name for name, module in model.named_modules()}
    places = [names[id(block)] + "." for block in blocks(model)]
    reached = tuple(place for place in places if any(name.startswith(place) for name in adapted))
    expected = {name: reason for name, reason in reasons.items() if name.startswith(reached)}
    left = {name: reason or LEFT_OUT for name, reason in expected.items() if name not in adapted}
    return Coverage([name for name in expected if name in adapted], left)


def notes_on_rest(model: nn.Module) -> list[str]:
    """A line on what text does not pass, such as a vision tower, for a plan's notes."""
    total = sum(parameter.numel() for parameter in model.parameters())
    named, distance = dict(model.named_parameters()), distances(model)
    beyond = [name for name in named if name not in distance]
    if not beyond:
        return []
    share = sum(named[name].numel() for name in beyond) / total
    places = ", ".join(dict.fromkeys(_place(name, distance) for name in beyond))
    return [f"{places}, {share:.0%} of the parameters, stay as they are: text does not pass them"]


def notes_on_adapted(model: nn.Module, tuned: nn.Module, takes_all: bool) -> list[str]:
    """Lines on what an adapter leaves of `model`, for a plan's notes; all of it where all was to be adapted."""
    covered = coverage(model, tuned)
    notes = []
    experts = expert_tensors(model)
    left = sum(tensor.numel() for name, tensor in experts.items() if name.removesuffix(".weight") in covered.left)
    if left:
        share = left / sum(parameter.numel() for parameter in model.parameters())
        notes.append(f"experts, {share:.0%} of the parameters, are not adapted: {LEFT_OUT}")
    if takes_all:
        return [covered.words, *notes] if covered.left else notes
    stated = {name: why for name, why in covered.left.items() if why not in (ROUTER, LEFT_OUT)}
    return [*notes, *sorted({f"{name.rsplit('.', 1)[-1]} is not adapted: {why}" for name, why in stated.items()})]


def _in_block(name: str) -> str:
    """A module's name from its block on: what follows the last number."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit() and index + 1 < len(parts)]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)


def _place(name: str, distance: dict[str, int]) -> str:
    """The outermost module of a parameter outside the text model that has no part of the text model."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end]) + "."
        if not any(other.startswith(prefix) for other in distance):
            return parts[end - 1]
    return parts[-1]
