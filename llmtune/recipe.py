"""The recipe: closed, frozen sections; load, override, dump and JSON schema."""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from llmtune.errors import RecipeError
from llmtune.method import Closed, Facts, Method, PlanError
from llmtune.plan import Plan, Shape
from llmtune.yamlfile import Key, Located, load_yaml

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Model(Closed):
    """The base model."""

    base: Annotated[str, Field(min_length=1)]
    """A Hub id, a folder, a .gguf file, or package:NAME for a model that an installed Python package carries."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id; the commit it means is pinned when the run starts."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit puts the frozen linear layers into NF4 with double quantisation."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of computation; trained tensors are always kept in fp32. auto: bf16 where the machine has it."""


class Data(Closed):
    """Training, validation and test rows: chat `messages`, or `prompt` and `completion`."""

    train: Annotated[str, Field(min_length=1)]
    """A .jsonl, .csv or .parquet file, or a Hub data set as owner/name or owner/name:split."""
    eval: str | None = None
    """Rows for the validation loss; a share of train is set aside where not given."""
    test: str | None = None
    """Rows that base and tuned model are compared on; the eval rows where not given."""
    eval_fraction: Share = 0.05
    """The share of train that is set aside, by content, where eval is not given; 0 for none."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens a row may have."""
    overlength: Literal["drop", "error", "truncate_prompt"] = "drop"
    """What happens to a longer row; an answer is never cut."""
    overlap: Literal["drop", "warn", "error"] = "drop"
    """What happens to training rows that also stand in eval or test."""


class Train(Closed):
    """The training loop."""

    epochs: Annotated[float, Field(gt=0)] = 2
    """Passes over the data."""
    max_steps: Count | None = None
    """Optimizer steps after which training ends, whatever epochs says."""
    batch_size: Count = 16
    """Rows per optimizer step, over all processes."""
    micro_batch_size: Count | None = None
    """Rows per forward pass and process; batch_size / processes, at most 8, where not given."""
    warmup: Share = 0.05
    """Share of the steps in which a newly trained group's rate rises."""
    schedule: Shape = "cosine"
    """How rates fall to the end of training."""
    optimizer: Literal["adamw"] = "adamw"
    """The optimizer."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initialisation, order and dropout."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_every: Annotated[float, Field(gt=0, le=1)] = 0.25
    """A checkpoint after each such share of the steps."""
    keep: Count = 2
    """Checkpoints kept; the newest ones."""


class Launch(Closed):
    """How training is started."""

    accelerate: Literal["auto", "cpu", "multi_cpu", "single_gpu", "ddp", "fsdp2", "zero2", "zero3", "multi_node"] = (
        "auto"
    )
    """The file in accelerate_configs/; auto looks at the machine."""
    processes: Count | None = None
    """Processes; what the accelerate config says where not given."""


class Eval(Closed):
    """Base and tuned model on the same questions."""

    suite: Annotated[str, Field(min_length=1)] = "quick"
    """A suite of eval/ by name, a suite file, or none."""
    limit: Count | None = None
    """Rows per task; all where not given. Reported with every number."""
    shots: Annotated[int, Field(ge=0)] = 5
    """Worked examples that the few-shot base model sees."""


class Merge(Closed):
    """Full weights from base and delta."""

    enabled: bool = True
    """Write merged/."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the merged weights are stored in."""


class Publish(Closed):
    """Where the result goes."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """owner/name on the Hub."""
    visibility: Literal["private", "public"] = "private"
    """public only where written out."""
    weights: Literal["delta", "merged"] = "delta"
    """Upload what was trained, or the full weights."""


class Recipe(Closed):
    """A base model, data, a method, and what is done with the result."""

    model: Model
    data: Data
    method: Method
    train: Train = Train()
    launch: Launch = Launch()
    eval: Eval = Eval()
    merge: Merge = Merge()
    publish: Publish | None = None

    _where: Located = PrivateAttr()

    def error(self, key: str, message: str) -> RecipeError:
        """A one-line error that names this recipe's file and the line of a dotted key."""
        return self._where.error(tuple(int(part) if part.isdigit() else part for part in key.split(".")), message)

    @property
    def path(self) -> Path:
        """The file it was loaded from."""
        return self._where.path

    def plan(self, facts: Facts) -> Plan:
        """The plan for a model with these facts; raises RecipeError at the method's line where the model cannot follow."""
        try:
            return self.method.plan(facts)
        except PlanError as error:
            raise self.error(f"method.{error.key}", str(error)) from error
        except ValueError as error:
            raise self.error("method", str(error)) from error


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The validated recipe in a file, with `a.b=c` overrides applied; raises RecipeError."""
    located = load_yaml(path)
    for override in overrides or []:
        _override(located, override)
    try:
        recipe = Recipe.model_validate(located.value)
    except ValidationError as error:
        raise _explain(located, error) from error
    recipe._where = located
    return recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out."""
    return yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """The JSON schema of recipes."""
    return Recipe.model_json_schema()


def _override(located: Located, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not YAML") from error
    *parents, last = dotted.split(".")
    section = located.value
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {}
        section = section[parent]
    section[last] = value


def _explain(located: Located, error: ValidationError) -> RecipeError:
    """The first validation error as one line: file, line, key, what is wrong and what would be right."""
    first = min(error.errors(), key=lambda found: (found["type"] not in ("extra_forbidden",), -len(found["loc"])))
    key = _yaml_key(located, first["loc"])
    return located.error(key, _message(located, key, first))


def _yaml_key(located: Located, loc: tuple[Any, ...]) -> Key:
    """The error's location without the union tags that pydantic puts between keys."""
    key: list[str | int] = []
    value = located.value
    for position, part in enumerate(loc):
        if isinstance(value, dict) and part in value or isinstance(value, list | tuple) and isinstance(part, int):
            key.append(part)
            value = value[part]
        elif position == len(loc) - 1 and isinstance(value, dict):
            key.append(part)
    return tuple(key)


def _message(located: Located, key: Key, found: Any) -> str:
    kind, value = found["type"], found["input"]
    if kind == "extra_forbidden":
        return _unknown_key(key, found["loc"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = str(found.get("ctx", {}).get("expected_tags", "")).replace("'", "")
        given = value.get("kind") if isinstance(value, dict) else value
        near = difflib.get_close_matches(str(given), expected.split(", "), n=1, cutoff=0.4)
        return (
            f"kind {given!r} is not one of {expected}" + (f"; did you mean {near[0]!r}?" if near else "")
            if expected
            else "needs a kind"
        )
    if kind == "missing":
        return "is missing and has no default"
    if isinstance(value, bool) and "bool" not in kind:
        return f"{found['msg'][0].lower()}{found['msg'][1:]}, got {str(value).lower()} (YAML reads on, off, yes and no as true and false; quote the word)"
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        mantissa, exponent = re.split("[eE]", value)
        sign = "" if exponent[0] in "+-" else "+"
        dot = "" if "." in mantissa else ".0"
        return f"{value} is a string in YAML; write {mantissa}{dot}e{sign}{exponent}"
    text = found["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | list | tuple) else f", got {value!r}"
    return f"{text[0].lower()}{text[1:]}{shown}"


def _unknown_key(key: Key, loc: tuple[Any, ...]) -> str:
    known = sorted(_known_keys(Recipe, loc[:-1]))
    near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
    return "unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}")


def _known_keys(model: Any, loc: tuple[Any, ...]) -> set[str]:
    """The keys of the section that a location (with union tags) points to."""
    for position, part in enumerate(loc):
        if (
            isinstance(part, str)
            and isinstance(model, type)
            and issubclass(model, BaseModel)
            and part in model.model_fields
        ):
            return _known_keys(model.model_fields[part].annotation, loc[position + 1 :])
        for option in get_args(model):
            kinds = (
                option.model_fields["kind"].annotation
                if isinstance(option, type) and hasattr(option, "model_fields") and "kind" in option.model_fields
                else None
            )
            if kinds is not None and part in get_args(kinds):
                return _known_keys(option, loc[position + 1 :])
    if isinstance(model, type) and issubclass(model, BaseModel):
        return set(model.model_fields)
    return {name for option in get_args(model) for name in _known_keys(option, ())}
