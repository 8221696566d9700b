"""The `data` section: where rows come from, and what is learned of them."""

import math
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field

from llmtune.errors import PlanError
from llmtune.fields import Closed, Fraction, Share, listed

Format = Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "preference", "text"]


class Source(Closed):
    """One source of a mixture."""

    source: Annotated[str, Field(min_length=1)]
    """A source of rows, as data.train names one."""
    fraction: Fraction
    """The share of the mixture's rows that it gives; rows are drawn by train.seed, and none comes twice."""


def _check_mixture(mixture: tuple[Source, ...]) -> tuple[Source, ...]:
    """Raise PlanError, its key below data.train, for a source that comes twice or fractions that do not sum to 1."""
    places = [os.path.normpath(part.source) for part in mixture]
    for index, place in enumerate(places):
        if place in places[:index]:
            message = f"{mixture[index].source} is source {places.index(place)} too; name it once, with both fractions"
            raise PlanError(f"{index}.source", message)
    total = math.fsum(part.fraction for part in mixture)
    if abs(total - 1) > _ROUNDING:
        fitting = [round(part.fraction / total, 4) for part in mixture]
        fitting[-1] = round(1 - math.fsum(fitting[:-1]), 4)
        words = ", ".join(f"{fraction:g}" for fraction in fitting)
        raise PlanError("", f"the fractions sum to {total:.6g}, not to 1; in the same proportions they are {words}")
    return mixture


_ROUNDING = 1e-6
"""How far the sum of written fractions, such as three times 0.3333333, may be from 1."""


class Data(Closed):
    """Training, validation and test rows."""

    train: (
        Annotated[str, Field(min_length=1)]
        | Annotated[tuple[Source, ...], BeforeValidator(listed), Field(min_length=1), AfterValidator(_check_mixture)]
    )
    """A file, a folder or pattern of files, or a Hub data set as owner/name, owner/name:split or
    owner/name:configuration:split; or a list of sources with their fractions, a mixture."""
    eval: str | None = None
    """Rows for the validation loss; a share of train is set aside where not given."""
    test: str | None = None
    """Rows on which base and tuned model are compared; the eval rows where not given."""
    eval_fraction: Share = 0.05
    """The share of train that is set aside, by content, where eval is not given; 0 for none."""
    share: Fraction = 1
    """The share of the training rows that is used, chosen by content: the rows of a smaller share are among those of a
    larger one. Validation and test rows stay as they are."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens a row may have."""
    overlength: Literal["drop", "error", "truncate_prompt", "truncate_turns"] = "drop"
    """What happens to a longer row; an answer is never cut. truncate_turns leaves out a conversation's last turns."""
    overlap: Literal["drop", "warn", "error"] = "drop"
    """What happens to training rows that eval or test also contains."""
    format: Format = "auto"
    """What the rows are; auto tells by their columns."""
    map: dict[str, str] = Field(default_factory=dict)
    """Columns under other names, as {prompt: question}; braces join some, as {prompt: "{instruction}: {input}"}."""
    learn: Literal["answers", "last_answer", "all"] = "answers"
    """What is learned of a conversation: all answers, the last one, or every token. A tool's result never is."""
    reasoning: Literal["learn", "context", "drop"] = "learn"
    """Whether the reasoning before an answer is learned, only read, or left out."""
    template: dict[str, Any] = Field(default_factory=dict)
    """Values for the chat template, such as {enable_thinking: false}; used in training, evaluation and chat alike."""

    def sources(self, part: str) -> tuple[Source, ...]:
        """The sources of train, eval or test: one of fraction 1 where it is no mixture, none where there is none."""
        value = getattr(self, part)
        if isinstance(value, str):
            return (Source(source=value, fraction=1.0),)
        return value or ()

    def source_keys(self, part: str) -> dict[str, str]:
        """The sources of train, eval or test by their dotted keys: data.train, or data.train.0.source of a mixture."""
        value = getattr(self, part)
        if isinstance(value, str):
            return {f"data.{part}": value}
        return {f"data.{part}.{index}.source": one.source for index, one in enumerate(value or ())}

    def renamed(self, name: Callable[[str, str], str]) -> Self:
        """The section with other names of its sources: what `name` gives for a dotted key and the source there."""
        changed: dict[str, Any] = {}
        for part in ("train", "eval", "test"):
            names = [name(key, source) for key, source in self.source_keys(part).items()]
            if isinstance(getattr(self, part), str):
                changed[part] = names[0]
            elif names:
                pairs = zip(self.sources(part), names, strict=True)
                changed[part] = tuple(one.model_copy(update={"source": new}) for one, new in pairs)
        return self.model_copy(update=changed)

    @property
    def held_out_part(self) -> str:
        """The key that names the rows on which base and tuned model are compared: test, else eval, else train."""
        return "test" if self.test else "eval" if self.eval else "train"

    @property
    def held_out(self) -> tuple[Source, ...]:
        """The sources that base and tuned model are compared on: test, else eval, else train."""
        return self.sources(self.held_out_part)
