"""What `llmtune infer` is asked for: the rows, the file for the answers, who answers, and how tokens are chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from llmtune.answering.sampling import Sampling
from llmtune.errors import RecipeError, nearest
from llmtune.files import user_path
from llmtune.storage.urls import url_of

MODELS = {"tuned": ("tuned",), "base": ("base",), "both": ("base", "tuned")}


class Options(TypedDict, total=False):
    """The fields of a `Request` that have defaults, as keywords."""

    model: str
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int | None
    samples: int
    seed: int
    system: str | None
    overwrite: bool


@dataclass(frozen=True)
class Request:
    """Rows to be answered; raises RecipeError for options that do not go together."""

    rows: str
    """A source of rows, as `data.train` names one."""
    out: Path
    model: str = "tuned"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None
    """None for 256, or 1.5 times the longest answer where some are given."""
    samples: int = 1
    seed: int = 0
    system: str | None = None
    """For rows without a system prompt; None for the one that the run's rows share, "" for none."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise RecipeError(
                f"--model {self.model}: is not one of {', '.join(MODELS)}{nearest(self.model, [*MODELS])}"
            )
        self.sampling(1)
        if self.samples < 1:
            raise RecipeError(f"--samples {self.samples}: a whole number from 1 on is expected")
        self._check_greedy()
        self._check_files()

    def _check_greedy(self) -> None:
        """Raise RecipeError for options of drawn answers where none is drawn."""
        if self.temperature == 0:
            for name in ("top_p", "top_k", "seed"):
                if getattr(self, name) != getattr(type(self), name):
                    raise RecipeError(f"{_option(name)}: is for drawn answers; add --temperature 1, or leave it out")
            if self.samples > 1:
                same = "without --temperature all answers to a row are the same"
                raise RecipeError(f"--samples {self.samples}: {same}; add --temperature 1")

    def _check_files(self) -> None:
        """Raise RecipeError for files that answers cannot be read from or written to."""
        if url := url_of(self.rows) or url_of(self.out):
            raise RecipeError(f"{url}: is a URL; rows and answers are files of this machine (a run may be on a store)")
        if self.out.suffix != ".jsonl":
            raise RecipeError(
                f"{self.out}: answers are JSON lines; name the file {self.out.with_suffix('.jsonl').name}"
            )
        if self.out.is_dir():
            raise RecipeError(f"{self.out}: is a folder; name a file in it")
        paths = (self.out, self.journal, self.summary)
        if user_path(self.rows).absolute() in {path.absolute() for path in paths} or self._is_linked:
            raise RecipeError(f"{self.out}: would replace the rows that are read; give another -o")

    @property
    def _is_linked(self) -> bool:
        """Whether the file for the answers is the file of the rows by another name."""
        return self.out.exists() and user_path(self.rows).exists() and self.out.samefile(user_path(self.rows))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that answer, in their order."""
        return MODELS[self.model]

    @property
    def journal(self) -> Path:
        """The file that holds the answers as they come."""
        return self.out.with_suffix(".partial.jsonl")

    @property
    def summary(self) -> Path:
        """The file that says how the answers were made, and how many are right."""
        return self.out.with_suffix(".summary.json")

    def sampling(self, max_new_tokens: int) -> Sampling:
        """How tokens are chosen, with a number of tokens where the user gives none; raises RecipeError."""
        room = max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        try:
            return Sampling(self.temperature, self.top_p, self.top_k, room, self.seed)
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise RecipeError(f"{_option(name)}: {rest}") from error


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
