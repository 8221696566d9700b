"""`llmtune init`: reads a user's rows and writes a short, commented recipe for them."""

import functools
import json
import re
from pathlib import Path

import yaml

from llmtune.adapters.kinds import KINDS as ADAPTERS
from llmtune.advising.first import FirstAdvice, first_advice
from llmtune.cli.base_name import DEFAULT_MODEL, check_model
from llmtune.cli.shipped import refuse_existing, relative, schema_line
from llmtune.cli.summary import DataSummary, summarize
from llmtune.data.formats.columns import write_map
from llmtune.data.rows import Form, iterate
from llmtune.data.sources.locate import source_files
from llmtune.errors import LlmtuneError, RecipeError, nearest, one_line
from llmtune.files import shipped_folder, write_text
from llmtune.methods.kinds import METHODS
from llmtune.recipe.shorthand import ALONE, WORDS
from llmtune.working import working

KINDS = tuple(dict.fromkeys(("lora", *METHODS, *ALONE)))
"""What --method takes."""
LONGEST = 4096

# Usual names of a data set's other files; the first that exists is used.
_NAMES = {"eval": ("validation", "valid", "val", "eval", "dev"), "test": ("test",)}
_SPLITS = {"eval": "validation", "test": "test"}


def write_recipe(
    data: Path | None, model: str | None, method: str | None, out: Path
) -> tuple[Path, list[str], FirstAdvice]:
    """Write a recipe for `data` (None: the sample) to the new file `out`, and give notes and what is advised.

    Its method is the advised one where none is named. Raises RecipeError.
    """
    if method is not None and method not in KINDS:
        raise RecipeError(f"--method {method}: is not one of {', '.join(KINDS)}{nearest(method, list(KINDS))}")
    refuse_existing(out)
    notes = check_model(model or DEFAULT_MODEL)
    source = str(data) if data is not None else relative(shipped_folder("sample") / "train.jsonl")
    summary = summarize(source)
    files = _other_files(Path(source), Form(map=summary.map))
    base, epochs = model or DEFAULT_MODEL, _epochs(summary.rows)
    advice = first_advice(base, summary.rows, summary.kind, summary.labels, epochs)
    lines = _recipe(summary, files, base, method or advice.choice.arm)
    write_text(out, "\n".join(lines) + "\n")
    return out, notes, advice


def _other_files(train: Path, form: Form) -> dict[str, str]:
    """Find validation and test files beside train.* that are readable in its form, by the recipe's key.

    Of a folder, those are its files of other splits.
    """
    if train.is_dir():
        return {key: f"{train}:{split}" for key, split in _SPLITS.items() if _has_split(str(train), split)}
    stem, dot, ending = train.name.partition(".")
    if stem != "train" or not train.is_file():
        return {}
    candidates = {key: [train.with_name(name + dot + ending) for name in names] for key, names in _NAMES.items()}
    readable = {
        key: next((file for file in files if _is_readable(file, form)), None) for key, files in candidates.items()
    }
    return {key: str(file) for key, file in readable.items() if file is not None}


def _has_split(folder: str, split: str) -> bool:
    try:
        return source_files(folder, split) != source_files(folder)
    except RecipeError:
        return False


def _is_readable(file: Path, form: Form) -> bool:
    try:
        return file.is_file() and any(True for _ in iterate(str(file), form=form))
    except RecipeError:
        return False


def _recipe(data: DataSummary, files: dict[str, str], model: str, kind: str) -> list[str]:
    """Return the lines of the recipe."""
    length = min(max(128, -(-data.longest * 5 // 4 // 64) * 64), LONGEST)
    aside = (
        []
        if "eval" in files
        else [_line(f"eval_fraction: {_aside(data.rows)}", "no validation file: this share is set aside")]
    )
    return [
        schema_line(),
        f"# For {_text(data.source)}: {data.rows} {f'rows of up to {data.turns} turns' if data.turns else 'texts'}.",
        f"# Rows are {one_line(data.form, 200)}.",
        f"# {_why(kind, data.rows)}",
        *_hint(data),
        "# A line that starts with # is off: take the # away to set the key.",
        "model:",
        _line(f"base: {_text(model)}", f"or a Hub id, a folder, a .gguf file{_copy_words(model)}"),
        _line("# quantize: 4bit", "puts the frozen layers into 4 bits; LoRA over them is QLoRA"),
        "data:",
        f"  train: {_text(data.source)}",
        "  # 1% of replay, rows such as the base learned from, cures most forgetting; for that, train is a mixture:",
        f"  # [{{source: {_text(data.source)}, fraction: 0.99}}, {{source: replay.jsonl, fraction: 0.01}}]",
        *(f"  {key}: {_text(source)}" for key, source in files.items()),
        *(
            [_line(f"map: {write_map(data.map)}", "columns of the file, under the names that rows have")]
            if data.map
            else []
        ),
        *([] if "test" in files else [_line("# test: test.jsonl", "rows that are asked of base and tuned model")]),
        *aside,
        _line(f"max_length: {length}", f"tokens; the longest row has about {data.longest}, llmtune check counts"),
        "method:",
        _line(f"kind: {kind}", " | ".join(KINDS)),
        *_method_lines(kind, data.rows),
        _line(
            "# lr: 1.0e-4", "the learning rate; off, llmtune chooses it by method and model size: llmtune plan shows it"
        ),
        "train:",
        _line(f"epochs: {_epochs(data.rows)}", "passes over the data"),
        _line("# max_steps: 20", "for a first try"),
        _line(f"batch_size: {8 if data.rows < 1000 else 16}", "rows per step, over all processes"),
        _line("# micro_batch_tokens: 4096", "tokens at a time, else as many as fit into free memory"),
        _line("# activation_checkpointing: true", "less memory, a third more time; auto where memory is short"),
        *_eval_lines(data),
        *_COMMON,
    ]


def _eval_lines(data: DataSummary) -> list[str]:
    """Return the section of the evaluation; plain texts have no choice of metrics."""
    limit = "how many rows both models are asked; suite: none for no evaluation"
    if not data.metrics:
        return [f"# eval: {{suite: quick, limit: 200}}   # {limit}"]
    why = next((words for name, words in _METRICS.items() if name in data.metrics), _OTHER_METRICS)
    chosen = f"metrics: [{', '.join(data.metrics)}]"
    return ["eval:", _line(chosen, why), _line("# limit: 200", limit)]


_METRICS = {
    "json": "every answer is JSON: how many are valid, and which fields are right",
    "labels": "the answers are labels: accuracy and F1, by likelihood",
    "chrf": "the answers are texts: how much they share with the true ones",
}
_OTHER_METRICS = "also: json | labels | rouge | chrf | perplexity | regex:PATTERN"
_COMMON = (
    "# merge: {enabled: false}            # write no full weights, keep the delta alone",
    "# publish: {repo: me/my-model}       # upload the result; private unless it says visibility: public",
    "# launch: {accelerate: fsdp2}        # several GPUs share the model; auto, the default, takes what is there",
)


def _aside(rows: int) -> float:
    """The share of the rows to set aside: some twenty of a small file, as two or three rows measure nothing."""
    return 0.05 if rows >= 400 else 0.1 if rows >= 200 else 0.2


def _method_lines(kind: str, rows: int) -> list[str]:
    """Return the keys below `kind`."""
    lines = METHODS[kind].example if kind in METHODS else ADAPTERS[WORDS[kind]["kind"]].example(rows)
    return [_line(*line) for line in lines]


@functools.cache
def _copy_words(model: str) -> str:
    """What a comment says of a model in a package: how much of it is a quantized copy."""
    if not model.startswith("package:"):
        return ""
    from llmtune.model.files.converted import count_types, find_gguf, stored_words

    try:
        file = find_gguf(model.removeprefix("package:"))
        with working(f"reading {file.name}"):
            return f"; this is a copy {stored_words(count_types(file, model))}"
    except LlmtuneError:
        return ""


def _line(text: str, comment: str) -> str:
    return f"  {text:<32}  # {comment}" if comment else f"  {text}"


def _text(value: str) -> str:
    """Quote a string if YAML would misread it."""
    plain = re.fullmatch(r"[\w./:@+-]+", value) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def _why(kind: str, rows: int) -> str:
    return METHODS[kind].why if kind in METHODS else ADAPTERS[WORDS[kind]["kind"]].why(rows)


def _epochs(rows: int) -> int:
    return 3 if rows < 1000 else 2 if rows <= 50_000 else 1


def _hint(data: DataSummary) -> list[str]:
    """A line on what a tuned model has to beat where the answers are labels."""
    labels = f"The answers repeat like {data.labels} labels"
    linear = "a linear model over TF-IDF learns such data in a second, llmtune plan --methods tells how well"
    return [f"# {labels}: {linear}."] if data.labels else []
