"""The arms that a comparison is asked for: names of ARMS, or a file of the user's own."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from llmtune.arms.arm import ARMS, Arm
from llmtune.errors import RecipeError, nearest
from llmtune.recipe.located_yaml import Located, load_yaml_list
from llmtune.recipe.sections import Recipe
from llmtune.searching.space import Value, text_of

BASELINES = ("zero-shot", "few-shot", "scratch", "tf-idf")
"""What is reached without the training of the recipe's base."""
USUAL = ("full", "frozen", "gradual", "discriminative", "lora")
"""The arms of a comparison that names none; qlora stands in for a lora that does not fit."""
_NAME = re.compile(r"[A-Za-z0-9][\w .+=,-]{0,59}")
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_WORDS_OF_YAML = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
_OWN = ("method", "train", "memory", "model")
_SHARED = ("model.base", "model.revision", "train.seed", "train.keep_best", "train.patience")
"""The sections that arms may differ in, and the keys of these that they may not: scores would not compare."""
_EXAMPLE = "- {name: lora on the top half, set: {method: lora}}"


def read_arms(words: Sequence[str]) -> tuple[Arm, ...]:
    """The arms that names, or a file of arms, stand for; raises RecipeError for what names none, or two by one name."""
    arms: list[Arm] = []
    for word in words:
        arms += _of_file(Path(word)) if word.endswith((".yaml", ".yml")) else [_named(word)]
    names = [arm.name for arm in arms]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise RecipeError(f"--arms: two arms have the name {twice}; name each once")
    return tuple(arms)


def _named(word: str) -> Arm:
    if word in ARMS:
        return ARMS[word]
    hint = nearest(word, ARMS) or f"; arms are {', '.join(ARMS)}, or a .yaml file of your own"
    raise RecipeError(f"--arms: {word!r} is no arm{hint}")


def _of_file(path: Path) -> list[Arm]:
    """The arms of a file: a list of `{name, set}`, or of names of ARMS; raises RecipeError with file and line."""
    located = load_yaml_list(path, f"a list of arms such as {_EXAMPLE}")
    arms = [_arm(located, place, entry) for place, entry in enumerate(located.value)]
    if not arms:
        raise RecipeError(f"{path}:1: names no arm; write some, such as {_EXAMPLE}")
    names: list[str] = []
    for place, arm in enumerate(arms):
        if arm.name in names:
            first = located.places[(names.index(arm.name),)]
            raise located.error((place,), f"an arm has the name {arm.name} already, at {first}; give another")
        names.append(arm.name)
    return arms


def _arm(located: Located, place: int, entry: object) -> Arm:
    if isinstance(entry, str) and entry in ARMS:
        return ARMS[entry]
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise located.error((place,), f"an arm has a name and what it sets, as in {_EXAMPLE}")
    unknown = next((key for key in entry if key not in ("name", "set")), None)
    if unknown is not None:
        hint = nearest(str(unknown), ("name", "set")) or "; an arm has a name and what it sets, in set"
        raise located.error((place, unknown), f"is no key of an arm{hint}")
    name, settings = entry["name"], entry.get("set", {})
    if not _NAME.fullmatch(name) or name in BASELINES:
        reason = "is the name of a baseline" if name in BASELINES else "names a folder: letters, digits and .,+=- alone"
        raise located.error((place, "name"), f"{name!r} {reason}; give another name")
    if not isinstance(settings, dict):
        raise located.error((place, "set"), "sets values of the recipe by their keys, as in {method.lr: 1.0e-3}")
    overrides = tuple(_overrides(settings))
    for key in (override.partition("=")[0] for override in overrides):
        section = key.partition(".")[0]
        if key in _SHARED or (section in Recipe.model_fields and section not in _OWN):
            message = f"{key} is the same for all arms; an arm sets other keys, of {', '.join(_OWN[:-1])} or {_OWN[-1]}"
            raise located.error((place, "set"), message)
    return Arm(name, overrides)


def _overrides(settings: Mapping[str, object], key: str = "") -> list[str]:
    """The `a.b=c` overrides of nested or dotted keys; a method or an adapter is replaced, with all in its section."""
    overrides: list[str] = []
    for name, value in settings.items():
        dotted = f"{key}.{name}" if key else name
        if isinstance(value, dict) and "kind" not in value and value:
            overrides += _overrides(value, dotted)
        else:
            overrides.append(f"{dotted}={_flow(value)}")
    return overrides


def _flow(value: object) -> str:
    """A value in one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and (not _PLAIN.fullmatch(value) or value.lower() in _WORDS_OF_YAML):
        return json.dumps(value, ensure_ascii=False)
    return text_of(cast(Value, value))
