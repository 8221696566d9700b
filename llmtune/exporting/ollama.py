"""The form ollama: a GGUF file of the merged weights and a Modelfile for `ollama create`."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.data.findings import thinking_block
from llmtune.data.first_rows import first_rows, shared_opening
from llmtune.evaluation.questions import context_length
from llmtune.exporting.chat_format import ChatFormat, chat_format
from llmtune.exporting.forms import Export
from llmtune.exporting.gguf import form as gguf
from llmtune.exporting.rows import ROWS
from llmtune.files import link
from llmtune.model.base import Base, load_config
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.run import Run
from llmtune.working import working

MODELFILE = "Modelfile"
_CONTEXT = 4096
"""The context that the Modelfile asks for at least, as far as the model has it."""


def check(export: Export) -> None:
    """Raise MachineError for what ends the writing of the GGUF file."""
    if _exported(export) is None:
        gguf.check(export)


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write the Modelfile, and the GGUF file, or link the one that was exported already."""
    before = _exported(export)
    if before is None:
        facts = gguf.write(export, folder)
    else:
        facts = {key: value for key, value in before.items() if key != "files"}
        link(export.run.path / before["files"][0], folder / facts["file"])
    merged = export.merged()
    text, has_template = modelfile(export.run, Base(merged, str(merged), None, None), facts["file"])
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    return facts | {"template": has_template}


def prove(export: Export, folder: Path) -> dict[str, Any]:
    """Prove the GGUF file, unless it is one that was proved when it was exported."""
    return {} if _exported(export) else gguf.prove(export, folder)


def summary(folder: Path, facts: dict[str, Any]) -> list[str]:
    """What was written, what was proved, and how to give it to Ollama."""
    lines = [f"exported  {folder / MODELFILE}, from {facts['file']}", gguf.proof_words(facts)]
    if not facts["template"]:
        lines.append(
            "the chat template is more than text around each turn, so the Modelfile has none: Ollama must know it by "
            "itself; compare `ollama show NAME --template` with it before you rely on the model"
        )
    name = folder.parent.parent.resolve().name.lower()
    return [*lines, f"use it: cd {shlex.quote(str(folder))} && ollama create {shlex.quote(name)} -f {MODELFILE}"]


def modelfile(run: Run, merged: Base, file: str) -> tuple[str, bool]:
    """The text of a Modelfile for merged weights in a GGUF file, and whether it has a template."""
    settings, tokenizer, stop = run.recipe(), load_tokenizer(merged), stop_ids(merged)
    stops = [str(tokenizer.decode([token])) for token in sorted(stop)]
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    rows = [row for row in first_rows(settings.data, settings.data.held_out_part, ROWS)[:ROWS] if row.messages]
    samples = [list(map(dict, row.prompt)) for row in rows if not row.tools]
    form = None
    if tokenizer.chat_template:
        form = chat_format(tokenizer, stops, dict(settings.data.template), adds_bos, samples)
    if form:
        form = replace(form, opening=form.opening + thinking_block(run))
    context = min(context_length(load_config(merged)), max(_CONTEXT, settings.data.max_length))
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {context}", "PARAMETER temperature 0"]
    lines += [f'PARAMETER stop "{text}"' for text in stops if text and '"' not in text]
    lines += _template_lines(form, shared_opening(settings.data)[0])
    return "\n".join(lines) + "\n", form is not None


def _template_lines(form: ChatFormat | None, shared: str | None) -> list[str]:
    """The lines of template and system prompt: the prompt that all rows share, else the template's own."""
    system = shared if shared is not None else form.default_system if form else None
    lines = [f'TEMPLATE """{form.go_template()}"""'] if form else []
    return lines + ([f'SYSTEM """{system}"""'] if system and '"""' not in system else [])


def _exported(export: Export) -> dict[str, Any] | None:
    """The facts of the GGUF file of this type, where it was exported and is as it was."""
    entry = export.run.manifest()["steps"].get("export", {})
    facts: dict[str, Any] | None = entry.get("forms", {}).get(f"gguf:{export.type}")
    if facts is None or not export.run.done("export") or not export.run.done("merge"):
        return None
    with working("checking the GGUF file"):
        export.run.verify("export")
    return facts
