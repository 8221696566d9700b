"""The recipes that ship with llmtune, and what a recipe in a user's folder names of llmtune's own files."""

from pathlib import Path

from llmtune.errors import RecipeError, nearest
from llmtune.files import shipped_folder, write_text

_SCHEMA = "# yaml-language-server: $schema="
_SAMPLE = "llmtune/sample/"


def recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes by name: quickstart, qwen3-4b/lora."""
    folder = shipped_folder("recipes")
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (file.parent != folder, file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def purpose(file: Path) -> str:
    """Return the line of a shipped recipe that says what it is for."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ") and not line.startswith(_SCHEMA)), "")


def show(listed: list[dict[str, str]]) -> None:
    """Print the recipes and what each is for, one a line."""
    width = max(len(one["name"]) for one in listed)
    for one in listed:
        print(f"{one['name']:<{width}}  {one['what']}")
    print("\ncopy one: llmtune recipes NAME")


def copy(name: str, out: Path | None) -> Path:
    """Copy a shipped recipe to a new file, with paths that hold there; raises RecipeError."""
    known = recipes()
    if name not in known:
        last = [full for full in known if full.rpartition("/")[2] == name]
        hint = f"; did you mean {' or '.join(last)}?" if last else nearest(name, list(known))
        raise RecipeError(f"there is no shipped recipe {name!r}{hint or '; llmtune recipes lists them'}")
    target = out or Path(f"{name.rpartition('/')[2]}.yaml")
    refuse_existing(target)
    text = known[name].read_text(encoding="utf-8").replace(_SAMPLE, f"{relative(shipped_folder('sample'))}/")
    lines = [schema_line() if line.startswith(_SCHEMA) else line for line in text.splitlines()]
    write_text(target, "\n".join(lines) + "\n")
    return target


def complete(incomplete: str) -> list[str]:
    """Return the names of shipped recipes that start with what a shell has so far."""
    return [name for name in recipes() if name.startswith(incomplete)]


def schema_line() -> str:
    """Return the first line of a recipe, by which editors check its keys: the schema that ships with llmtune."""
    return f"{_SCHEMA}{(shipped_folder('docs') / 'recipe.schema.json').resolve().as_uri()}"


def refuse_existing(file: Path) -> None:
    """Raise RecipeError where a file to write is there already, or its folder is a file."""
    if file.exists() or file.is_symlink():
        raise RecipeError(f"{file}: exists already and is not overwritten; choose another name with -o")
    blocking = next((folder for folder in file.parents if folder.exists() and not folder.is_dir()), None)
    if blocking:
        raise RecipeError(f"{file}: {blocking} is a file, not a folder; choose another name with -o")


def relative(path: Path) -> str:
    """Return a path from the working folder where it lies inside it, else the absolute path."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
