"""The .gguf files of a run that was exported: what a card says of them."""

from typing import Any

from llmtune.publishing.endpoint import private_endpoint
from llmtune.publishing.markdown import code, indented
from llmtune.run import Run

_FOLDER = "exported/gguf/"


def gguf_facts(run: Run) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each .gguf file, by its name in the run's folder; empty where none was exported."""
    files = run.manifest()["steps"].get("export", {}).get("files", {})
    return {name: facts for name, facts in files.items() if name.startswith(_FOLDER) and name.endswith(".gguf")}


def gguf_section(run: Run, repo: str) -> list[str]:
    """The card's paragraphs on .gguf files: what they are, how they were proved, and how to run them."""
    names = [name.removeprefix(_FOLDER) for name in gguf_facts(run)]
    if not names:
        return []
    listed = ", ".join(map(code, names))
    text = f"The whole tuned model, base included, for llama.cpp and programs that build on it: {listed}."
    return ["## GGUF", " ".join([text, *_proofs(run)]), indented("\n".join(_commands(repo, names[0])))]


def _proofs(run: Run) -> list[str]:
    """What the proof of each export measured, in sentences."""
    lines = []
    for key, facts in run.manifest()["steps"]["export"].get("forms", {}).items():
        values = {name: facts.get(name) for name in ("gap", "bound")} if key.startswith("gguf") else {}
        if values and all(isinstance(value, int | float) for value in values.values()):
            lines.append(
                f"Read back by transformers, the logits of {code(key)} differ from the merged model's by up to "
                f"{values['gap']:.2g} (bound {values['bound']:.2g})."
            )
    return lines


def _commands(repo: str, file: str) -> list[str]:
    """The commands that fetch one of the files and run it with llama.cpp and with Ollama."""
    endpoint = private_endpoint()
    title = repo.rsplit("/", 1)[-1].lower()
    return [
        *([f"export HF_ENDPOINT={endpoint}"] if endpoint else []),
        f"hf download {repo} {file} --local-dir .",
        f"llama-cli -m {file}",
        "",
        f"echo 'FROM ./{file}' > Modelfile",
        f"ollama create {title} -f Modelfile",
        f"ollama run {title}",
    ]
