"""The form gguf: one file for llama.cpp and what is built on it, with its proof."""

import importlib.util
import shlex
from pathlib import Path
from typing import Any

from llmtune.errors import ProofError
from llmtune.evaluation.questions import context_length
from llmtune.exporting.forms import Export
from llmtune.exporting.gguf import converter, llama_cpp
from llmtune.exporting.gguf.architecture import architecture_name
from llmtune.exporting.gguf.converter import converter_folder
from llmtune.exporting.gguf.proof import prove_equal
from llmtune.exporting.gguf.reading import check_sizes, check_tokens
from llmtune.exporting.gguf.types import stored_bytes
from llmtune.exporting.gguf.vocabulary import Vocabulary, find_pre, read_pre
from llmtune.exporting.gguf.write import named_tensors, write_gguf
from llmtune.exporting.room import check_room
from llmtune.exporting.rows import prompts_of
from llmtune.merging.proof import probes
from llmtune.model.base import Base, build_skeleton, load_config, vocabulary
from llmtune.model.files.converted import find_gguf
from llmtune.model.files.locate import locate_base
from llmtune.model.files.quantization import dequantized_format
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.numbers import size
from llmtune.run import Run


def check(export: Export) -> None:
    """Raise MachineError for an architecture, a tokenizer or a converter that is missing, and for too little room.

    Raises ProofError for an adapter that cannot be merged.
    """
    settings = export.run.recipe()
    if settings.method.adapter.unmergeable:
        raise ProofError(settings.method.adapter.unmergeable.message)
    base = locate_base(settings.model)
    llama = converter_folder(export.llama_cpp)
    if llama:
        converter.check(llama, export.type)
    else:
        config = load_config(base)
        architecture_name(config)
        if not dequantized_format(config):
            named_tensors(base.folder, config, base.name)
        _pre(base)
    shapes = [list(tensor.shape) for tensor in build_skeleton(base).parameters()]
    check_room(export, base, sum(stored_bytes(export.type, shape) for shape in shapes))


def write(export: Export, folder: Path) -> dict[str, Any]:
    """Write the merged weights as one file, by llama.cpp's converter where its folder is given."""
    merged = export.merged()
    file = folder / f"{file_stem(export.run)}-{export.type.upper()}.gguf"
    base = Base(merged, str(merged), None, None)
    if llama := converter_folder(export.llama_cpp):
        converter.convert(llama, merged, file, export.type)
        return {"file": file.name, "type": export.type, "written_by": "llama.cpp's converter"}
    tensors = write_gguf(merged, file, export.type, file_stem(export.run), load_config(base), _vocabulary(export, base))
    return {"file": file.name, "type": export.type, "written_by": "the gguf package", "tensors": tensors}


def prove(export: Export, folder: Path) -> dict[str, Any]:
    """Read the file back by transformers, and by llama.cpp where it is installed, and compare it with merged/."""
    file = next(folder.glob("*.gguf"))
    merged = export.merged()
    base = Base(merged, str(merged), None, None)
    config, words, settings = load_config(base), _vocabulary(export, base, known=False), export.run.recipe()
    texts = probes(settings)
    prompts = prompts_of(settings, words.tokenizer, words.stop, context_length(config))
    check_sizes(file, config)
    stops = check_tokens(file, words, texts, prompts.ids)
    ids = [words.tokenizer(text).input_ids for text in texts]
    own = converter_folder(export.llama_cpp) is None
    facts, answers = prove_equal(file, export.type, base, words.tokenizer, ids, prompts, own)
    facts |= {"stops": stops, "pre": read_pre(file)}
    if importlib.util.find_spec("llama_cpp"):
        facts["llama_cpp"] = llama_cpp.compare(file, words.tokenizer, texts, prompts, answers)
    return facts


def summary(folder: Path, facts: dict[str, Any]) -> list[str]:
    """What was written, what was proved, and how to run it."""
    file = folder / facts["file"]
    lines = [f"exported  {file}  ({size(file.stat().st_size)})", proof_words(facts)]
    if 2 * facts["equal"] < facts["rows"]:
        lines.append(f"{facts['type']} changes most of the answers; gguf:q8_0 keeps more of them")
    if own := facts.get("llama_cpp"):
        lines.append(f"llama.cpp itself gives {own['equal']} of {facts['rows']} of these answers")
    return [*lines, f"run it: llama-cli -m {shlex.quote(str(file))}"]


def proof_words(facts: dict[str, Any]) -> str:
    """What was proved of a GGUF file, in words."""
    return (
        f"read back by transformers, {facts['type']}: {facts['equal']} of {facts['rows']} greedy answers are the "
        f"merged model's; largest logit gap {facts['gap']:.2g} (bound {facts['bound']:.2g}; {facts['gap_read']:.2g} to "
        f"the same weights in {facts['type']}); it stops at {', '.join(facts['stops'])}"
    )


def file_stem(run: Run) -> str:
    """The name of a run's files for other programs."""
    return run.path.resolve().name


def _vocabulary(export: Export, merged: Base, known: bool = True) -> Vocabulary:
    """The tokenizer of the merged weights; not `known`, without the name for how it splits text."""
    pre = _pre(locate_base(export.run.recipe().model)) if known else ""
    tokens = vocabulary(load_config(merged))
    return Vocabulary(merged.folder, load_tokenizer(merged), stop_ids(merged), tokens, pre)


def _pre(base: Base) -> str:
    """llama.cpp's name for how the base's tokenizer splits text: that of the .gguf file it came from, if it did."""
    if base.converted is not None:
        package = base.name.startswith("package:")
        file = find_gguf(base.name.removeprefix("package:")) if package else Path(base.name).expanduser()
        if pre := read_pre(file):
            return pre
    return find_pre(load_tokenizer(base), base.name)
