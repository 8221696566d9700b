"""The recipe, and its short sections, which reject unknown keys and never change; load, dump and JSON schema."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from llmtune.errors import FieldError, PlanError
from llmtune.fields import Closed, Count, Positive, listed
from llmtune.methods.kinds import Method
from llmtune.plan.stages import Facts, Plan
from llmtune.recipe.data import Data
from llmtune.recipe.document import Document
from llmtune.recipe.located_yaml import Located
from llmtune.recipe.model import Model
from llmtune.recipe.paths import PATH_KEYS, locate, parse_key
from llmtune.recipe.shorthand import add_shorthands, expand, open_word
from llmtune.recipe.train import Train

__all__ = [
    "Data",
    "Eval",
    "Launch",
    "Memory",
    "Merge",
    "Model",
    "Publish",
    "Recipe",
    "Train",
    "dump",
    "load",
    "schema",
    "values",
]


def _compiled(name: str) -> str:
    """Return regex:PATTERN; raises ValueError for a pattern that is none."""
    import regex

    try:
        regex.compile(name.removeprefix("regex:"))
    except regex.error as error:
        raise ValueError(f"{name} is no regular expression: {error}") from error
    return name


MetricName = Annotated[
    Literal["exact_match", "json", "labels", "rouge", "chrf", "perplexity"]
    | Annotated[str, Field(pattern=r"^regex:.+$"), AfterValidator(_compiled)],
    Field(examples=["regex:^[A-Z]+$"]),
]


class Memory(Closed):
    """What frozen blocks may cost in time, memory and disk."""

    frozen_blocks: Literal["auto", "cache", "recompute", "stream"] = "auto"
    """Whether frozen blocks run once per row. cache keeps the output of the last one on disk, recompute runs them at
    every step, auto caches where that saves time. stream caches, and reads one block at a time from the safetensors
    files, so that they may be larger than memory."""
    cache_limit_gb: Annotated[float, Field(ge=0)] = 8
    """Disk that cached outputs of all runs together may take; the least recently used go first. stream needs room for
    the outputs of two blocks."""

    @property
    def cache_limit(self) -> int:
        """The same in bytes."""
        return round(min(self.cache_limit_gb, 1e9) * 1e9)  # a float may be too large for any number of bytes


class Launch(Closed):
    """How training processes are started."""

    accelerate: Annotated[
        Literal["auto", "cpu", "multi_cpu", "single_gpu", "ddp", "fsdp2", "multi_node"]
        | Annotated[str, Field(pattern=r"\.ya?ml$")],
        Field(examples=["my_config.yaml"]),
    ] = "auto"
    """A file of accelerate_configs/ by name, or your own by path; auto chooses one for this machine."""
    processes: Count | None = None
    """Number of processes; the accelerate config's where not given."""

    @property
    def is_open(self) -> bool:
        """Whether several processes may be started in a way that the machine decides."""
        return self.accelerate == "auto" and self.processes != 1

    @field_validator("accelerate", mode="before")
    @classmethod
    def _refuse_deepspeed(cls, value: object) -> object:
        if value in ("zero2", "zero3"):
            raise ValueError(f"{value} is a config of DeepSpeed, which cannot follow a plan; try fsdp2")
        return value


class Eval(Closed):
    """Base and tuned model on the same questions."""

    suite: Annotated[str, Field(min_length=1)] = "quick"
    """A suite of eval/ by name, a suite file, or none."""
    limit: Count | None = None
    """Rows per task; all where not given. Reported with every number."""
    shots: Annotated[int, Field(ge=0)] = 5
    """Worked examples in the prompt of the few-shot base model."""
    rows: Count = 64
    """Validation rows that are answered for train.keep_best: score."""
    metrics: Annotated[tuple[MetricName, ...] | None, BeforeValidator(listed)] = None
    """What is measured on held-out rows beside exact match and loss: json, labels, rouge, chrf, perplexity,
    regex:PATTERN; by the data where not given."""
    forgetting: bool = True
    """Ask both models a small fixed set of general questions and texts, which shows what the training cost."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs the models: vllm, where it is installed, answers much faster on GPUs, and by kernels of its own."""


class Merge(Closed):
    """Full weights from base and delta."""

    enabled: bool = True
    """Write merged/."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The data type in which merged weights are stored."""


class Publish(Closed):
    """Where the result is published."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$", examples=["owner/name"])]
    """owner/name on the Hub."""
    visibility: Literal["private", "public"] = "private"
    """public only where written out."""
    weights: Literal["delta", "merged"] | None = None
    """Upload what was trained, or the full weights; delta for adapters that PEFT itself loads, else merged."""
    collection: Annotated[str | None, Field(min_length=1)] = None
    """The title of a collection of the owner's that the repository is added to."""
    grid_gco2_per_kwh: Positive | None = None
    """Grams of CO2 per kWh of the grid that trained: with measured energy, the card then states the emissions."""


Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow"]


class Recipe(Document):
    """A base model, data, a method, and what happens to the result."""

    model: Model
    data: Data
    method: Method
    train: Train = Train()
    memory: Memory = Memory()
    launch: Launch = Launch()
    eval: Eval = Eval()
    merge: Merge = Merge()
    publish: Publish | None = None
    track: Annotated[tuple[Tracker, ...], BeforeValidator(listed)] = ()
    """Trackers that the run's numbers are also sent to, each an installed package."""

    @classmethod
    def _write_out(cls, located: Located) -> None:
        expand(located)

    @classmethod
    def _open(cls, located: Located, override: str) -> None:
        open_word(located, override)

    def _pinned(self) -> Self:
        """Put in place of each relative path the one, from the working directory, of what exists."""
        changed: dict[str, Any] = {}
        for key in PATH_KEYS:
            section, name = map(str, key)
            settings = changed.get(section, getattr(self, section))
            value = getattr(settings, name)
            if value is not None:
                changed[section] = settings.model_copy(update={name: self._locate(".".join(map(str, key)), value)})
        return self.model_copy(update={**changed, "data": self.data.renamed(self._locate)})

    def _locate(self, key: str, value: str) -> str:
        """The path at a dotted key from the working directory, where it names one that exists."""
        return locate(value, parse_key(key), self.folders(key))

    @property
    def method_words(self) -> str:
        """The method as people call it: QLoRA (rank 16), gradual unfreezing."""
        words = self.method.in_words
        if self.model.quantize == "none":
            return words
        if self.model.quantize == "8bit":
            return f"{words}, over an 8-bit base"
        return f"Q{words}" if words.startswith("LoRA") else f"{words}, over a 4-bit base"

    def plan(self, facts: Facts) -> Plan:
        """Make the plan for a model with these facts; raises FieldError at the key that does not fit the model."""
        try:
            return self.method.plan(facts)
        except PlanError as error:
            raise FieldError(f"method.{error.key}", str(error)) from error

    def resolved(self, facts: Facts, revision: str | None) -> Self:
        """Fill in the base's revision and every learning rate; raises FieldError like `plan`."""
        self.plan(facts)
        pinned = self.model.model_copy(update={"revision": revision})
        return self.model_copy(update={"model": pinned, "method": self.method.resolved(facts)})


def load(path: Path, overrides: Sequence[str] | None = None) -> Recipe:
    """Load and validate the recipe in a file, with `a.b=c` overrides applied; raises RecipeError."""
    return Recipe.load(path, overrides or ())


def values(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, as JSON has them, with every default filled in."""
    return dict(json.loads(recipe.model_dump_json()))


def dump(recipe: Recipe) -> str:
    """Write the recipe as YAML with every default filled in."""
    return yaml.safe_dump(values(recipe), sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """Return the JSON schema of recipes."""
    return add_shorthands(Recipe.model_json_schema())
