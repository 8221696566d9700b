"""infer(run, request): the rows of a file answered by base, tuned model or both, in batches, into a file."""

import signal
from pathlib import Path
from typing import Any

from llmtune.answering.batches import Answerer, Ask, modes
from llmtune.answering.journal import Answer, Journal, open_journal, refuse_other_settings
from llmtune.answering.models import Prompts, find_base, load_models, read_prompts
from llmtune.answering.opening import choose_opening
from llmtune.answering.output import Output, columns
from llmtune.answering.prepare import Prepared, Preparer
from llmtune.answering.request import Request
from llmtune.answering.rows import choose_form, read_rows, survey
from llmtune.answering.sampling import Sampling
from llmtune.data.encoding.template import template_sha256
from llmtune.data.rows import Form
from llmtune.errors import Interrupted, LlmtuneError, RecipeError
from llmtune.evaluation.boundary import failures_named, lacks_named
from llmtune.evaluation.generate import refuse_broken
from llmtune.evaluation.questions import asking_rules, context_length
from llmtune.files import digest_of, fingerprint, read_json
from llmtune.inference.placement import place
from llmtune.model.base import load_config
from llmtune.run import Run, locates_mistakes
from llmtune.working import working

_KEPT = "the answers so far are kept, and the same command goes on"
_LESS_MEMORY = "free some memory, or ask for shorter answers with --max-new-tokens"


@locates_mistakes
def infer(run: Run, request: Request) -> dict[str, Any]:
    """Answer the rows of a source; writes them with their answers, and a summary beside them, which is returned.

    Raises RecipeError for rows or a file that cannot be taken, ProofError for a delta that changed, MachineError for
    what this machine lacks, Interrupted where the user stops it: the same command then goes on.
    """
    with failures_named("infer", _KEPT), lacks_named("infer", f"{_LESS_MEMORY}; {_KEPT}"):
        work = Work(run, request)
        if request.out.exists() and not request.overwrite:
            return work.done_before()
        with open_journal(request.journal) as journal:
            return work.do(journal)


class Work:
    """The answers to one request, from the rows to the file."""

    def __init__(self, run: Run, request: Request) -> None:
        self.run, self.request, self.recipe = run, request, run.recipe()
        self.form = choose_form(request.rows, Form.of(self.recipe.data))
        with working(f"reading {request.rows}"):
            self.survey = survey(request.rows, self.form, columns(request))
        with working("checking the trained weights"):
            self.delta = {Path(name).name: facts["sha256"] for name, facts in run.verify("train").items()}
            self.base = find_base(run)
        self.prompts, self.placement = read_prompts(run, self.base), place(self.recipe, self.base)
        has_template = bool(self.prompts.tokenizer.chat_template)
        self.opening = choose_opening(self.recipe, self.survey, request, has_template)
        self.context = context_length(load_config(self.base))
        self.settings = self._settings()

    def done_before(self) -> dict[str, Any]:
        """Return the summary of a file that holds these very answers; raises RecipeError for any other file."""
        out, file = self.request.out, self.request.summary
        try:
            stored = read_json(file) if file.is_file() else None
        except LlmtuneError as error:
            raise RecipeError(f"{file}: is damaged; give another -o, or --overwrite {out}") from error
        if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
            raise RecipeError(f"{out}: was not written by llmtune infer; give another -o, or --overwrite it")
        refuse_other_settings(out, stored["settings"], self.settings)
        if stored.get("file") != fingerprint(out):
            raise RecipeError(f"{out}: was changed after it was written; give another -o, or --overwrite it")
        print(f"{out} holds these answers already; --overwrite makes them again", flush=True)
        return stored

    def do(self, journal: Journal) -> dict[str, Any]:
        """Answer what is not answered yet, and write the file; the journal is removed."""
        journal.begin(self.settings, self.request.overwrite)
        if self.request.overwrite:
            self.request.out.unlink(missing_ok=True)
        with working("encoding the rows", self.survey.rows, "rows") as step:
            rules = asking_rules(self.recipe.data, self.context)
            preparer = Preparer(self.prompts, rules, self.opening)
            prepared = preparer.prepare(read_rows(self.request.rows, self.form), step)
        sampling = self.request.sampling(prepared.room(self.context))
        try:
            self._answer(journal, prepared, sampling)
        except KeyboardInterrupt as stop:
            count = sum(map(len, journal.answers.values()))
            kept = f"{count} answers are in {journal.path}, and the same command goes on" if count else "no answer yet"
            interrupted = Interrupted(f"infer was stopped; {kept}")
            interrupted.exit_code = 128 + int(getattr(stop, "number", signal.SIGINT))
            raise interrupted from None
        output = Output(self.request, prepared, journal, sampling.max_new_tokens, self.context)
        facts = {"max_new_tokens": sampling.max_new_tokens, "settings": self.settings}
        summary = output.write(read_rows(self.request.rows, self.form), self.survey.digest, facts)
        journal.path.unlink(missing_ok=True)
        return summary

    def _settings(self) -> dict[str, Any]:
        """What decides the answers: others are not mixed with these in one file."""
        request, data = self.request, self.recipe.data
        names = ("model", "samples", "temperature", "top_p", "top_k", "seed", "max_new_tokens")
        return {
            "rows": self.survey.digest,
            "base": f"{self.base.name} {self.base.revision or ''}".strip(),
            "delta": self.delta,
            **{name: getattr(request, name) for name in names},
            "system": self.opening.system,
            "tools": digest_of(list(self.opening.tools)),
            "format": [self.form.format, dict(self.form.map)],
            "template": dict(data.template),
            "reasoning": data.reasoning,
            "chat_template": template_sha256(self.prompts.tokenizer),
            "dtype": str(self.placement.dtype).removeprefix("torch."),
            "bits": self.placement.bits,
        }

    def _answer(self, journal: Journal, prepared: Prepared, sampling: Sampling) -> None:
        """Let each model answer what it has not answered yet."""
        missing = {name: self._missing(journal, prepared, name) for name in self.request.models}
        done = sum(map(len, journal.answers.values()))
        if done:
            print(f"{done} answers are there, {sum(map(len, missing.values()))} are missing", flush=True)
        if not any(missing.values()):
            return
        if self.placement.note:
            print(f"infer: {self.placement.note}", flush=True)
        with working("loading the models"):
            models = load_models(self.run, self.base, self.placement)
        answerer = Answerer(models, self.prompts, sampling, self.context)
        decode = Decoder(self.prompts, prepared.keeps_special)
        for name, asks in missing.items():
            ids = {ask: prepared.prompts[ask.row] for ask in asks}
            if not ids:
                continue
            with modes(models)[name](), working(f"{name} model", len(ids), "answers") as step:
                refuse_broken(models.model, list(ids[asks[0]]), name)
                for batch, answers in answerer.answer(ids, step):
                    journal.add(name, dict(zip(batch, map(decode, answers), strict=True)))

    def _missing(self, journal: Journal, prepared: Prepared, name: str) -> list[Ask]:
        rows = (row for row, ids in enumerate(prepared.prompts) if len(ids))
        asks = (Ask(row, sample) for row in rows for sample in range(self.request.samples))
        return [ask for ask in asks if ask not in journal.of(name)]


class Decoder:
    """Decodes answers as evaluation does."""

    def __init__(self, prompts: Prompts, keeps_special: bool) -> None:
        self.tokenizer, self.keeps_special = prompts.tokenizer, keeps_special

    def __call__(self, tokens: list[int]) -> Answer:
        """Return an answer, with its special tokens where the true ones have some."""
        kept = [token for token in tokens if not self.keeps_special or token != self.tokenizer.pad_token_id]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=not self.keeps_special))
        return Answer(text, len(tokens))
