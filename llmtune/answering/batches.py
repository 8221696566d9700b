"""Answers to prompts in batches of about the same length, greedy or drawn; too large a batch is halved."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from llmtune.answering.draw import Draw, stream
from llmtune.answering.models import Models, Prompts
from llmtune.answering.sampling import Sampling
from llmtune.errors import lacks_memory
from llmtune.evaluation.generate import greedy, rows_per_batch
from llmtune.machine.device import release_cached
from llmtune.working import Step


class Ask(NamedTuple):
    """One answer to be made: a row's place, and which of its samples it is."""

    row: int
    sample: int


@dataclass(frozen=True)
class Answerer:
    """Answers prompts with the model as it is now."""

    models: Models
    prompts: Prompts
    sampling: Sampling
    context: int

    def answer(self, ids: Mapping[Ask, Sequence[int]], step: Step) -> Iterator[tuple[list[Ask], list[list[int]]]]:
        """Yield batches with the tokens of their answers, the longest prompts first.

        An answer has as many tokens as the sampling says, or as the context has left, and no stop token.
        """
        order = sorted(ids, key=lambda ask: (-len(ids[ask]), ask))
        for room, group in groupby(order, key=lambda ask: self.room(len(ids[ask]))):
            rest = list(group)
            while rest:
                count = rows_per_batch(self.models.model, len(rest), len(ids[rest[0]]) + room)
                batch, rest = rest[:count], rest[count:]
                yield from self._halved(batch, [list(ids[ask]) for ask in batch], room, step)

    def room(self, tokens: int) -> int:
        """Return how many tokens the answer to a prompt of so many may have."""
        return min(self.sampling.max_new_tokens, self.context - tokens)

    def _halved(
        self, batch: list[Ask], rows: list[list[int]], room: int, step: Step
    ) -> Iterator[tuple[list[Ask], list[list[int]]]]:
        """Answer a batch; one that does not fit into memory, in two halves."""
        try:
            answers = self._tokens(batch, rows, room, step)
        except Exception as error:
            if len(batch) == 1 or not lacks_memory(error):
                raise
            answers = None
        if answers is not None:
            yield batch, [[token for token in answer if token not in self.prompts.stop] for answer in answers]
            return
        release_cached(self.models.model.device)
        half = len(batch) // 2
        yield from self._halved(batch[:half], rows[:half], room, step)
        yield from self._halved(batch[half:], rows[half:], room, step)

    def _tokens(self, batch: list[Ask], rows: list[list[int]], room: int, step: Step) -> list[list[int]]:
        streams = [stream(self.sampling.seed, ask.row, ask.sample) for ask in batch]
        draw = Draw(self.sampling, streams) if self.sampling.temperature else None
        return greedy(self.models.model, rows, self.prompts.stop, room, step, draw)


def modes(models: Models) -> dict[str, Callable[[], Any]]:
    """What makes a model in memory the one of that name, inside a block."""
    return {"base": models.as_base, "tuned": nullcontext}
