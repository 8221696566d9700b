"""export(run, to): writes a form for another program to exported/, and keeps it only with its proof."""

from pathlib import Path
from typing import Any

from llmtune.exporting.forms import Export, Form, check_converter, read_form
from llmtune.files import link, write_folder
from llmtune.merging.step import merge
from llmtune.run import Run, locates_mistakes
from llmtune.working import working


@locates_mistakes
def export(run: Run, to: str, llama_cpp: Path | None = None) -> dict[str, Any]:
    """Write the form that `to` names, such as gguf:q8_0, to the run's exported/ and return its facts.

    Raises ProofError, and leaves no files, if they are not the tuned model; RecipeError for a form that is unknown;
    MachineError for what this machine lacks.
    """
    form, kind = read_form(to)
    check_converter(form, llama_cpp)
    writer = form.writer()
    job = Export(run, kind, lambda: _merged(run), llama_cpp)
    run.verify("train")
    writer.check(job)
    folder, key = run.exported / form.name, form.key(kind)
    with write_folder(folder) as partial:
        facts = writer.write(job, partial)
        facts |= writer.prove(job, partial)
        files = sorted(file.relative_to(partial) for file in partial.rglob("*") if file.is_file())
        before = _others(run, form, key)
        if form.keeps:
            _keep(folder, partial, _files(run, key))
    facts["files"] = [(folder / file).relative_to(run.path).as_posix() for file in files]
    with working("hashing what was exported"):
        forms = {**before, key: facts}
        paths = [run.path / file for one in forms.values() for file in one["files"]]
        run.mark("export", paths, forms=forms)
    for line in writer.summary(folder, facts):
        print(line)
    return facts


def _merged(run: Run) -> Path:
    """The run's merged/ as the step left it, merged first where that is not done."""
    if run.done("merge"):
        with working("checking the merged weights"):
            run.verify("merge")
    else:
        print("not merged yet under these settings: merging first")
        merge(run)
    return run.merged


def _others(run: Run, form: Form, key: str) -> dict[str, Any]:
    """The facts of the other exports that the manifest has and whose files are still there."""
    forms = run.manifest()["steps"].get("export", {}).get("forms", {})
    replaced = {key} if form.keeps else {name for name in forms if name.partition(":")[0] == form.name}
    return {
        name: facts
        for name, facts in forms.items()
        if name not in replaced and all((run.path / file).is_file() for file in facts["files"])
    }


def _files(run: Run, key: str) -> list[Path]:
    """The files of an earlier export of that name."""
    facts = run.manifest()["steps"].get("export", {}).get("forms", {}).get(key, {})
    return [run.path / file for file in facts.get("files", ())]


def _keep(folder: Path, partial: Path, own: list[Path]) -> None:
    """Keep in `partial`, which replaces `folder`, the files of other exports that lie there, at no cost of disk."""
    for file in folder.iterdir() if folder.is_dir() else ():
        target = partial / file.name
        if file.is_file() and file not in own and not target.exists():
            link(file, target)
