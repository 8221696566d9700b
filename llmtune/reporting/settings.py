"""The report on settings: the recipe as a readable list, and its text behind a fold."""

from typing import Any

from llmtune.numbers import number, rate
from llmtune.recipe.sections import Recipe
from llmtune.reporting.html import Html, facts, fold, join, section, tag

Settings = dict[str, Any]
"""A recipe, or a part of one, as plain values."""

_SECTIONS = {
    "model": "Model",
    "data": "Data",
    "method": "Method",
    "adapter": "Adapter",
    "train": "Training",
    "memory": "Memory",
    "launch": "Processes",
    "eval": "Evaluation",
    "merge": "Merge",
    "publish": "Publishing",
}
_NAMES = {
    "lr": "learning rate",
    "max_length": "tokens a row may have",
    "overlength": "longer rows",
    "overlap": "rows that eval or test has too",
    "grad_clip": "largest gradient norm",
    "save_every": "checkpoint every",
    "keep": "checkpoints kept",
    "cache_limit_gb": "cache limit, GB",
    "dtype": "stored in",
    "dora": "DoRA",
    "rslora": "rank-stabilized",
    "init": "start",
    "eval": "validation rows",
    "test": "test rows",
    "train": "training rows",
    "eval_fraction": "share set aside for validation",
    "limit": "rows per task",
    "shots": "worked examples",
    "repo": "repository",
}
"""Names of recipe keys that do not read well as they are; any other key is shown with spaces."""


def settings_section(settings: Recipe, text: str) -> Html:
    """List the resolved recipe's settings by section; `text` is its file."""
    listed = (join(tag("h3", name), facts(_pairs(part))) for name, part in _groups(settings.model_dump()))
    return section(
        "Settings",
        tag("div", *(tag("div", group) for group in listed), class_="settings"),
        fold("The recipe as a file", tag("pre", tag("code", text.rstrip()), tabindex=0)),
        note="Every value that this run used, defaults included.",
    )


def _name(key: str) -> str:
    return _NAMES.get(key, key.replace("_", " "))


def _groups(values: Settings) -> list[tuple[str, Settings]]:
    """The sections of a recipe with their titles; a section inside another one, as the adapter is, follows it."""
    groups: list[tuple[str, Settings]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            plain = {name: one for name, one in value.items() if not _is_section(one)}
            nested = {name: one for name, one in value.items() if _is_section(one)}
            groups += [(_SECTIONS.get(key, _name(key)), plain), *_groups(nested)]
    return groups


def _is_section(value: object) -> bool:
    return isinstance(value, dict) and "kind" in value


def _pairs(values: Settings) -> list[tuple[str, object]]:
    """Names and values of a section, without those that are not given."""
    return [(_name(key), _value(value)) for key, value in values.items() if value not in (None, {}, (), [])]


def _value(value: object) -> str:
    """Format a setting: a list with commas, stages one after the other, a table of the user's own names as it is."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        stages = [_stage(one) for one in value if isinstance(one, dict)]
        return "; ".join(stages) or ", ".join(map(_value, value))
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return rate(value)
    return f"{value:g}" if isinstance(value, float) else number(value)


def _stage(fields: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in _pairs(fields))
