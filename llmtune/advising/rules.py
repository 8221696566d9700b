"""The rules of advice.yaml: read and checked, and those that hold for some facts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from llmtune.advising.facts import DEVICES, KINDS, NAMES, Facts
from llmtune.arms.arm import ARMS
from llmtune.errors import nearest
from llmtune.fields import Closed
from llmtune.recipe.located_yaml import Key, Located, load_yaml

ADVICE = Path(__file__).with_name("advice.yaml")
GENERAL = "general"
_WORDS = {"kind": KINDS, "device": DEVICES}
_BOUNDS = {"from", "below"}


class Case(Closed):
    """Facts under which a rule holds, and facts, changed from these, under which it does not."""

    fires: dict[str, Any]
    silent: dict[str, Any]


class Rule(Closed):
    """A piece of advice, when it holds, and who says so."""

    id: str
    when: dict[str, Any]
    """Conditions that all have to hold: a value, a list of values, or {from: A, below: B}."""
    about: str = GENERAL
    """The method that it speaks of, or general."""
    prefer: int = Field(default=0, ge=-5, le=5)
    """How strongly it speaks for the method (above 0) or against it."""
    advice: str
    source: str
    confidence: Literal["high", "medium", "low"]
    measured: str = ""
    """Figures of llmtune's own, with model, data and machine."""
    case: Case

    def holds(self, facts: Facts) -> bool:
        """Whether every condition holds; one on a fact that is not known does not."""
        return all(_holds(wanted, getattr(facts, name)) for name, wanted in self.when.items())


def load_rules(path: Path = ADVICE) -> tuple[Rule, ...]:
    """Read the rules in a file; raises RecipeError that names file, line and rule for one that cannot be."""
    located = load_yaml(path)
    listed = located.value.get("rules")
    if not isinstance(listed, list):
        raise located.error(("rules",), "a list of rules is expected")
    rules = tuple(_read(located, index, one) for index, one in enumerate(listed))
    for index, rule in enumerate(rules):
        if rule.id in {other.id for other in rules[:index]}:
            raise located.error(("rules", index, "id"), f"{rule.id} is the id of an earlier rule")
    return rules


def applying(rules: tuple[Rule, ...], facts: Facts) -> list[Rule]:
    """The rules that hold, in the file's order."""
    return [rule for rule in rules if rule.holds(facts)]


def _read(located: Located, index: int, value: object) -> Rule:
    key: Key = ("rules", index)
    try:
        rule = Rule.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = value.get("id") if isinstance(value, dict) else index
        raise located.error((*key, *first["loc"]), f"rule {name}: {first['msg']}") from error
    if rule.about not in (GENERAL, *ARMS):
        message = f"rule {rule.id}: no method {rule.about}{nearest(rule.about, [GENERAL, *ARMS])}"
        raise located.error((*key, "about"), message)
    if rule.prefer and rule.about == GENERAL:
        raise located.error((*key, "prefer"), f"rule {rule.id}: speaks of no method, so it can prefer none")
    for part, conditions in (("when", rule.when), ("fires", rule.case.fires), ("silent", rule.case.silent)):
        at = (*key, "when") if part == "when" else (*key, "case", part)
        for name, wanted in conditions.items():
            if reason := _problem(name, wanted, is_fact=part != "when"):
                raise located.error((*at, name), f"rule {rule.id}: {reason}")
    return rule


def _problem(name: str, wanted: object, is_fact: bool) -> str:
    """Why a condition, or a fact of a case, cannot be; empty where it can."""
    if name not in NAMES:
        return f"there is no fact {name}{nearest(name, list(NAMES))}"
    values = wanted if isinstance(wanted, list) else [wanted]
    if isinstance(wanted, Mapping):
        numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in wanted.values())
        if is_fact or not wanted or not set(wanted) <= _BOUNDS or not numbers:
            return "a range is {from: A}, {below: B}, or both, in numbers"
        return ""
    if is_fact and isinstance(wanted, list):
        return "a fact is one value"
    if name in _WORDS and not all(value in _WORDS[name] for value in values):
        return f"{name} is one of {', '.join(_WORDS[name])}"
    return ""


def _holds(wanted: object, value: object) -> bool:
    if value is None:
        return False
    if isinstance(wanted, Mapping):
        above = "from" not in wanted or wanted["from"] <= value
        return bool(above and ("below" not in wanted or wanted["below"] > value))
    return value in wanted if isinstance(wanted, list) else value == wanted
