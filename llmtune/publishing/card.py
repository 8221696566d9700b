"""The model card, from the run's own files: how it was trained and what came out, without a word of the data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.combining.words import combined_words, overlap_words
from llmtune.evaluation.tables import base_note, comparison_note, forgetting_lines, selection_note, task_table
from llmtune.evaluation.tables import table as results
from llmtune.files import read_json
from llmtune.model.files.converted import Converted
from llmtune.plan.table import PlanTable
from llmtune.publishing.header import (
    card_data,
    is_merged,
    merge_facts,
    publish_section,
    repository,
    sign,
    write_card,
)
from llmtune.publishing.markdown import code, indented, table
from llmtune.publishing.parts.gguf import gguf_facts, gguf_section
from llmtune.publishing.parts.hardware import footprint
from llmtune.publishing.parts.pictures import pictures
from llmtune.publishing.usage import needs, usage
from llmtune.recipe.paths import strip_paths
from llmtune.recipe.sections import Recipe, dump
from llmtune.run import Run


def card(run: Run, license: Mapping[str, str] | None = None) -> str:
    """Write the README.md of a run; `license` is the base's: license, license_name, license_link."""
    settings = run.recipe()
    base = read_json(run.delta / "base.json")
    title = repository(settings).rsplit("/", 1)[-1]
    parts = [
        f"# {title}",
        _opening(settings, base, merge_facts(run, settings)),
        "## Use",
        *needs(settings, base),
        indented(usage(settings, base)),
        *gguf_section(run, repository(settings)),
        "## Results on held-out rows",
        _results(run),
        *_made(run, settings),
        indented(dump(without_paths(settings))),
        "## What is in this repository",
        _weights(run, settings),
    ]
    text = "\n\n".join(parts) + "\n\n"
    return sign(write_card(card_data(run, settings, base, license or {}), text))


def without_paths(settings: Recipe) -> Recipe:
    """Return the recipe with file names in place of paths on this machine."""
    values = strip_paths(settings.model_dump())
    values["data"] |= settings.data.model_dump(include={"map", "template"})  # texts that may start as paths do
    seen: dict[str, int] = {}
    for source in values["data"]["train"] if not isinstance(settings.data.train, str) else ():
        name = source["source"]
        seen[name] = seen.get(name, 0) + 1
        source["source"] = f"{name} ({seen[name]})" if seen[name] > 1 else name  # a mixture names each source once
    return Recipe.model_validate(values)


def _opening(settings: Recipe, base: dict[str, Any], merged: dict[str, Any]) -> str:
    content = {
        "merged": "Full weights: the base and what was trained, merged.",
        "adapter": f"An adapter ({base['adapter']}) to load on top of the base.",
        "tensors": "The tensors that were trained, to put in place of the base's.",
    }["merged" if is_merged(settings) else base["kind"]]
    combined = base.get("combined")
    way = f"Fine-tuned by {code(settings.method_words)}" if not combined else f"It is {code(combined_words(combined))},"
    return f"{content} {_origin(base)}{_way(base, merged)} {way} with llmtune {__version__}."


def _way(base: dict[str, Any], merged: dict[str, Any]) -> str:
    """How the weights came from the base by another way than one training on it as it is; "" for that."""
    text = f" It is stored in {base['dequantized']} and was dequantized to bf16." if base.get("dequantized") else ""
    start = base.get("start")
    if start:
        text += f" Training went on from {code(start['name'])} (SHA-256 {code(start['sha256'])}), which is included."
    if merged.get("merged_into") not in (None, "original"):
        text += f" What was trained was merged into {code(merged['merged_into'])}, which the base was made from."
    return text


def _origin(base: dict[str, Any]) -> str:
    """Which weights the base is: a model on the Hub at a commit, or what a file was converted to."""
    name = code(strip_paths(base["hub_id"] or base["base"]))
    if not base.get("converted"):
        revision = f" at revision {code(base['revision'])}" if base["revision"] else ""
        return f"The base is {name}{revision}."
    converted = Converted(**base["converted"])
    sums = [facts["sha256"] for file, facts in (base.get("files") or {}).items() if file.endswith(".safetensors")]
    result = f"The converted weights have the SHA-256 {', '.join(map(code, sums))}." if sums else ""
    text = (
        f"The base is {code(strip_paths(base['base']))}: weights {converted.words} "
        f"(SHA-256 {code(converted.sha256)}). {result}"
    )
    if base["hub_id"]:
        text += f" They come from {name}, but are not its weights on the Hub: what was trained fits these alone."
    return text


def _results(run: Run) -> str:
    if not run.done("eval"):
        return "Not evaluated."
    rows = results(run, with_intervals=True)
    notes = [note for note in (comparison_note(run), base_note(run), selection_note(run)) if note]
    tables = [table(list(one[0]), [list(row.values()) for row in one]) for one in (rows, task_table(run)) if one]
    return "\n\n".join([*tables, *notes, *map(_sentence, forgetting_lines(run))])


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


def _made(run: Run, settings: Recipe) -> list[str]:
    """How the weights were made: trained, or combined from those of several runs."""
    if run.combined is None:
        return ["## How it was trained", *(one.markdown for one in pictures(run)), _training(run, settings)]
    rows = [[code(one["name"]), one["weight"], one["method"], code(one["sha256"])] for one in run.combined["runs"]]
    proof = (
        f"On {run.combined['texts']} texts the logits are within {run.combined['gap']:.2g} of those of the live "
        f"combination (bound {run.combined['bound']:.2g}); it moves the base's logits by up to "
        f"{run.combined['shift']:.2g}."
    )
    own = f"Nothing was trained for it. Data, evaluation and the rest of this recipe are those of {rows[0][0]}:"
    lines = [proof, *map(code, overlap_words(run.combined)), own]
    listed = table(["run", "weight", "method", "SHA-256 of its tensors"], rows)
    return ["## How it was combined", listed, *lines]


def _training(run: Run, settings: Recipe) -> str:
    plan = PlanTable.read(run.plan_file)
    rows = []
    for number, stage in enumerate(plan.stages, 1):
        words = (stage.steps_in_words, stage.trains.words(plan.blocks), stage.distances_in_words)
        rows.append([number, *words, stage.count_tensors, f"{stage.trained:,}", stage.rates_in_words])
    header = ["stage", "steps", "trains", "distance from the output", "tensors", "parameters", "rate (top .. bottom)"]
    seed = f"{plan.trained:,} of {plan.parameters:,} parameters trained at some time; seed {settings.train.seed}."
    return "\n\n".join([table(header, rows), *_hardware(run, settings), f"{seed} The whole recipe:"])


def _hardware(run: Run, settings: Recipe) -> list[str]:
    trained_on = footprint(run)
    return [trained_on.in_words(publish_section(settings).grid_gco2_per_kwh)] if trained_on else []


def _weights(run: Run, settings: Recipe) -> str:
    steps = run.manifest()["steps"]
    files = steps.get("merge" if is_merged(settings) else "train", {}).get("files", {})
    weights = {name: facts for name, facts in files.items() if name.endswith(".safetensors")} | gguf_facts(run)
    rows = [[code(Path(name).name), f"{facts['bytes']:,}", code(facts["sha256"])] for name, facts in weights.items()]
    text = table(["file", "bytes", "SHA-256"], rows)
    merge = steps.get("merge")
    if merge and is_merged(settings):
        made, mover = ("combined", "the combination") if run.combined else ("trained", "training")
        text += (
            f"\n\nStored in {merge['dtype']}. The largest logit gap between these weights, loaded by stock "
            f"transformers, and the model that was {made} is {merge['gap']:.2g} (bound {merge['bound']:.2g}); "
            f"{mover} moved logits by up to {merge['shift']:.2g}."
        )
    return text
