"""The .gguf files of a run that was exported, and Ollama's Modelfile beside them: what a card says of them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.model.base import Base
from llmtune.model.tokens import load_tokenizer
from llmtune.publishing.endpoint import private_endpoint
from llmtune.publishing.markdown import code, indented
from llmtune.run import Run

MODELFILE = "Modelfile"
_FOLDERS = ("exported/gguf/", "exported/ollama/")
_SYSTEM = re.compile(r'^SYSTEM """(.*?)"""\n', re.DOTALL | re.MULTILINE)


def gguf_facts(run: Run) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each .gguf file, by its place in the run's folder; empty where none was exported."""
    files = run.manifest()["steps"].get("export", {}).get("files", {})
    by_name: dict[str, str] = {}
    for folder in _FOLDERS:
        for place in files:
            if place.startswith(folder) and place.endswith(".gguf"):
                by_name.setdefault(Path(place).name, place)
    return {place: files[place] for place in by_name.values()}


def modelfile_place(run: Run) -> str | None:
    """Where Ollama's Modelfile lies in the run's folder; None where none was exported."""
    place = f"{_FOLDERS[1]}{MODELFILE}"
    return place if place in run.manifest()["steps"].get("export", {}).get("files", {}) else None


def public_modelfile(run: Run) -> tuple[str, bool]:
    """The text of Ollama's Modelfile without a system prompt that comes from the rows, and whether it had one."""
    text = (run.exported / "ollama" / MODELFILE).read_text(encoding="utf-8")
    system = _SYSTEM.search(text)
    if system is None:
        return text, False
    merged = Base(run.merged, str(run.merged), None, None)
    template = load_tokenizer(merged).chat_template if run.merged.is_dir() else None
    if isinstance(template, str) and system[1] in template:
        return text, False
    return text[: system.start()] + text[system.end() :], True


def gguf_section(run: Run, repo: str) -> list[str]:
    """The card's paragraphs on .gguf files: what they are, how they were proved, and how to run them."""
    names = [Path(place).name for place in gguf_facts(run)]
    if not names:
        return []
    listed = ", ".join(map(code, names))
    text = f"The whole tuned model, base included, for llama.cpp and programs that build on it: {listed}."
    paragraphs = ["## GGUF", " ".join([text, *_proofs(run)])]
    if modelfile_place(run) is None:
        return [*paragraphs, indented("\n".join(_commands(repo, names[0])))]
    file = run.manifest()["steps"]["export"]["forms"]["ollama"]["file"]
    words = f"{code(MODELFILE)} gives Ollama the chat template and the stop tokens."
    if public_modelfile(run)[1]:
        words += " Training had a system prompt, which is not published: add it as a SYSTEM line."
    return [*paragraphs, words, indented("\n".join(_commands(repo, file, MODELFILE)))]


def _proofs(run: Run) -> Iterator[str]:
    """What the proof of each file measured, in sentences."""
    told = set()
    for facts in run.manifest()["steps"]["export"].get("forms", {}).values():
        file = str(facts.get("file", ""))
        if file.endswith(".gguf") and file not in told:
            told.add(file)
            yield (
                f"Read back by transformers, {code(file)} gives {facts['equal']} of {facts['rows']} greedy answers of "
                f"the merged model, and logits that differ from its by up to {facts['gap']:.2g} (bound "
                f"{facts['bound']:.2g})."
            )


def _commands(repo: str, file: str, modelfile: str = "") -> list[str]:
    """The commands that fetch one of the files and run it with llama.cpp and with Ollama."""
    endpoint = private_endpoint()
    title = repo.rsplit("/", 1)[-1].lower()
    return [
        *([f"export HF_ENDPOINT={endpoint}"] if endpoint else []),
        f"hf download {repo} {' '.join(filter(None, (file, modelfile)))} --local-dir .",
        f"llama-cli -m {file}",
        "",
        *([] if modelfile else [f"echo 'FROM ./{file}' > {MODELFILE}"]),
        f"ollama create {title} -f {MODELFILE}",
        f"ollama run {title}",
    ]
