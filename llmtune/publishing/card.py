"""The model card, from the run's own files: how it was trained and what came out, without a word of the data."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from llmtune import __version__
from llmtune.adapters.kinds import KINDS
from llmtune.errors import FieldError, PublishError
from llmtune.evaluation.results import table as results
from llmtune.files import digest_of, read_json
from llmtune.plan.table import PlanTable
from llmtune.recipe.sections import Recipe, dump
from llmtune.run import Run

_SIGNATURE = re.compile(r"<!-- llmtune card ([0-9a-f]{64}) -->\n\Z")
_HUB_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(:[\w.-]+)?")
_WEIGHTS = {"adapter": "adapter_model.safetensors", "tensors": "trained.safetensors"}


def card(run: Run, license: Mapping[str, str] | None = None) -> str:
    """Write the README.md of a run; `license` is the base's: license, license_name, license_link."""
    settings = run.recipe()
    base = read_json(run.delta / "base.json")
    fields = _fields(settings, base, license or {})
    front = yaml.safe_dump(fields, sort_keys=False, width=1 << 20)
    if front_matter(f"---\n{front}---\n") != fields:
        raise PublishError(
            "the model card's YAML header would not read back as written; remove unusual characters from the recipe"
        )
    parts = [
        f"# {_repository(settings).rsplit('/', 1)[-1]}",
        _opening(settings, base),
        "## Use",
        *_needs(settings, base),
        indented(_usage(settings, base)),
        "## Results on held-out rows",
        _results(run),
        "## How it was trained",
        _training(run, settings),
        indented(dump(without_paths(settings))),
        "## What is in this repository",
        _weights(run, settings),
    ]
    return sign(f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n\n")


def sign(text: str) -> str:
    """Add a hash to a README.md, by which llmtune knows its own card until somebody edits it."""
    return text + f"<!-- llmtune card {digest_of(text)} -->\n"


def is_ours(text: str) -> bool:
    """Tell whether llmtune wrote a README.md and nobody has edited it."""
    signature = _SIGNATURE.search(text)
    return signature is not None and signature[1] == digest_of(text[: signature.start()])


def front_matter(text: str) -> dict[str, Any]:
    """Read the YAML header of a README.md; empty if there is none or it cannot be read."""
    head = re.match(r"---\r?\n(.*?)^---\s*?$", text, re.DOTALL | re.MULTILINE)
    try:
        value = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def without_paths(settings: Recipe) -> Recipe:
    """Return the recipe with file names in place of paths on this machine."""
    return Recipe.model_validate(strip_paths(settings.model_dump()))


def strip_paths(value: Any) -> Any:
    """Replace every text that is an absolute path by its last part, in lists and mappings too."""
    if isinstance(value, dict):
        return {key: strip_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(strip_paths(item) for item in value)
    is_path = isinstance(value, str) and re.match(r"[/~]|[A-Za-z]:[\\/]|\\\\", value)
    return PurePath(value.replace("\\", "/")).name if is_path else value


def indented(text: str) -> str:
    """Format text as a code block that no content can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _repository(settings: Recipe) -> str:
    if settings.publish is None:
        raise FieldError("publish", "is missing; add publish: {repo: owner/name} to the recipe")
    return settings.publish.repo


def _merged(settings: Recipe) -> bool:
    return settings.publish is not None and settings.publish.weights == "merged"


def _fields(settings: Recipe, base: dict[str, Any], license: Mapping[str, str]) -> dict[str, Any]:
    sources = (settings.data.train, settings.data.eval, settings.data.test)
    matches = [_HUB_DATASET.fullmatch(source) for source in sources if source]
    datasets = sorted({match["name"] for match in matches if match})
    library = "transformers" if _merged(settings) else "peft" if base["kind"] == "adapter" else None
    relation = "finetune" if _merged(settings) or base["kind"] == "tensors" else "adapter"
    fields = {
        "base_model": base["hub_id"],
        "base_model_relation": relation if base["hub_id"] else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        **{key: license[key] for key in ("license", "license_name", "license_link") if key in license},
        "tags": ["llmtune", settings.method.kind, *([base["adapter"]] if base["kind"] == "adapter" else [])],
        "datasets": datasets,
    }
    return {key: value for key, value in fields.items() if value}


def _opening(settings: Recipe, base: dict[str, Any]) -> str:
    content = {
        "merged": "Full weights: the base and what was trained, merged.",
        "adapter": f"An adapter ({base['adapter']}) to load on top of the base.",
        "tensors": "The tensors that were trained, to put in place of the base's.",
    }["merged" if _merged(settings) else base["kind"]]
    revision = f" at revision {code(base['revision'])}" if base["revision"] else ""
    return (
        f"{content} The base is {code(strip_paths(base['hub_id'] or base['base']))}{revision}. "
        f"Fine-tuned by the method {code(settings.method.kind)} with llmtune {__version__}."
    )


def _needs(settings: Recipe, base: dict[str, Any]) -> list[str]:
    """Return what has to be said before the code: where PEFT itself lacks the adapter, what adds it."""
    module = KINDS[base["adapter"]].registered_by
    if _merged(settings) or not module:
        return []
    return [
        f"PEFT itself has no {base['adapter']} adapters: {code(f'import {module}')} adds them, so llmtune has to be "
        f"installed ({__version__} or newer) and imported before the adapter is loaded."
    ]


def _usage(settings: Recipe, base: dict[str, Any]) -> str:
    repo = _repository(settings)
    name, commit = base["hub_id"], base["revision"] if base["hub_id"] == base["base"] else None
    origin = f"{name!r}, revision={commit!r}" if commit else repr(name)
    if _merged(settings):
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f"model = AutoModelForCausalLM.from_pretrained({repo!r})"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({repo!r})"]
    elif base["kind"] == "adapter":
        module = KINDS[base["adapter"]].registered_by
        lines = [f"import {module}"] if module else []
        lines += ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f"base = AutoModelForCausalLM.from_pretrained({origin})"]
        lines += [f"model = PeftModel.from_pretrained(base, {repo!r})"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({origin})"]
    else:
        lines = ["from huggingface_hub import hf_hub_download", "from safetensors.torch import load_file"]
        lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += [f'model = AutoModelForCausalLM.from_pretrained({origin}, dtype="float32")']
        lines += [f"trained = load_file(hf_hub_download({repo!r}, {_WEIGHTS['tensors']!r}))"]
        lines += ["model.load_state_dict(trained, strict=False)"]
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({origin})"]
    return "\n".join(lines)


def _results(run: Run) -> str:
    if not run.done("eval"):
        return "Not evaluated."
    rows = results(run)
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _training(run: Run, settings: Recipe) -> str:
    plan = PlanTable.read(run.plan_file)
    rows = []
    for number, stage in enumerate(plan.stages, 1):
        words = (stage.steps_in_words, stage.trains.words(plan.blocks), stage.distances_in_words)
        rows.append([number, *words, stage.count_tensors, f"{stage.trained:,}", stage.rates_in_words])
    header = ["stage", "steps", "trains", "distance from the output", "tensors", "parameters", "rate (top .. bottom)"]
    seed = f"{plan.trained:,} of {plan.parameters:,} parameters trained at some time; seed {settings.train.seed}."
    return f"{table(header, rows)}\n\n{seed} The whole recipe:"


def _weights(run: Run, settings: Recipe) -> str:
    steps = run.manifest()["steps"]
    files = steps.get("merge" if _merged(settings) else "train", {}).get("files", {})
    weights = {name: facts for name, facts in files.items() if name.endswith(".safetensors")}
    rows = [[code(Path(name).name), f"{facts['bytes']:,}", code(facts["sha256"])] for name, facts in weights.items()]
    text = table(["file", "bytes", "SHA-256"], rows)
    merge = steps.get("merge")
    if merge and _merged(settings):
        text += (
            f"\n\nStored in {merge['dtype']}. The largest logit gap between these weights, loaded by stock "
            f"transformers, and the model that was trained is {merge['gap']:.2g} (bound {merge['bound']:.2g}); "
            f"training moved logits by up to {merge['shift']:.2g}."
        )
    return text


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table; what would end a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"\s+", " ", str(cell)).replace("|", r"\|") for cell in row) + " |" for row in lines
    )


def code(text: str) -> str:
    """Format text as Markdown code in a line; nothing in it can end the code or the line."""
    return "`" + re.sub(r"\s+", " ", text).replace("`", "'") + "`"
