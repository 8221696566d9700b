"""vLLM reads Hugging Face's folders as they are: what is written is the command that serves the tuned model."""

import json
import shlex
from pathlib import Path
from typing import Any

from llmtune.errors import ProofError
from llmtune.evaluation.questions import context_length
from llmtune.exporting.forms import Export
from llmtune.exporting.vllm.adapter import Served, read_adapter
from llmtune.files import write_text
from llmtune.merging.checks import check_base
from llmtune.model.base import Base, load_config
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer
from llmtune.recipe.sections import Recipe

SCRIPT, TEMPLATE = "serve.sh", "chat_template.jinja"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": "auto"}
_ADAPTER, _MERGED = "lora", "merged"
_WAY = "the merged weights hold all of it: --to vllm:merged"


def check(export: Export) -> None:
    """Raise ProofError for another base, or where the adapter is asked for and vLLM would not take all of it."""
    check_base(export.run, locate_base(export.run.recipe().model))
    served = read_adapter(export.run.delta)
    if export.type == _ADAPTER and isinstance(served, str):
        raise ProofError(f"{export.run.delta}: vLLM would lose {served}; {_WAY}")


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write serve.sh, and for an adapter the chat template; returns how the model is served, and its command."""
    settings = export.run.recipe()
    base = locate_base(settings.model)
    served = read_adapter(export.run.delta)
    name = export.run.path.absolute().name
    if export.type == _MERGED or isinstance(served, str):
        export.merged()
        lost = served if isinstance(served, str) else None
        facts: dict[str, Any] = {"serves": _MERGED, "proof": "merge", "lost": lost}
        words = ["$run/merged", "--served-model-name", name]
    else:
        sizes = {"rank": served.rank, "max_rank": served.max_rank, "layers": len(served.layers)}
        facts = {"serves": _ADAPTER, "proof": "names and shapes", **sizes}
        words = _adapter_words(name, settings, base, served)
        if template := load_tokenizer(base).chat_template:
            write_text(folder / TEMPLATE, str(template))
            words += ["--chat-template", f"$run/exported/vllm/{TEMPLATE}"]
    words += ["--max-model-len", str(context_length(load_config(base)))]
    if settings.data.template:
        words += ["--default-chat-template-kwargs", json.dumps(dict(settings.data.template))]
    facts["command"] = f"vllm serve {' '.join(map(_quoted, words))}"
    write_text(folder / SCRIPT, _script(facts["command"], name))
    (folder / SCRIPT).chmod(0o755)
    return facts


def prove(export: Export, folder: Path) -> dict[str, Any]:
    """Return no more facts: vLLM computes by kernels of its own, and does not run here.

    The merged weights carry the proof of the merge; an adapter has the tensors, each of the rank, that vLLM reads.
    """
    return {}


def summary(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Return how to serve the model."""
    served = f"the adapter of rank {facts['rank']}" if facts["serves"] == _ADAPTER else "the merged weights"
    why = f"; of the delta itself, vLLM would lose {facts['lost']}" if facts.get("lost") else ""
    return [f"vllm    serves {served}{why}", f"        {folder / SCRIPT}"]


def _adapter_words(name: str, settings: Recipe, base: Base, served: Served) -> list[str]:
    """The words that serve a base with an adapter beside it."""
    on_hub = base.hub_id is not None and base.hub_id == base.name
    words = [base.name if on_hub else str(base.folder.absolute())]
    if on_hub and base.revision:
        words += ["--revision", base.revision]
    words += ["--enable-lora", "--lora-modules", f"{name}=$run/delta", "--max-lora-rank", str(served.max_rank)]
    return [*words, "--dtype", _DTYPES[settings.model.precision]]


def _quoted(word: str) -> str:
    """A word for the shell, in which $run stands for the run's folder."""
    if "$run/" not in word:
        return shlex.quote(word)
    before, _, after = word.partition("$run/")
    return f'{shlex.quote(before) if before else ""}"$run"/{shlex.quote(after)}'


def _script(command: str, name: str) -> str:
    return "\n".join(
        [
            "#!/bin/sh",
            f"# Serves the tuned model as {name} at port 8000, by the protocol of OpenAI.",
            "# More options of vLLM may follow; --max-model-len may be lower where memory is short.",
            "# Requests take their sampling from generation_config.json; temperature 0 gives greedy answers.",
            "set -eu",
            'run=$(cd "$(dirname "$0")/../.." && pwd)',
            f'exec {command} "$@"',
            "",
        ]
    )
