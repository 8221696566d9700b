"""Base and tuned model of a run as speakers: each answers in its own conversation, token by token."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.encoding.encode import prompt_ids
from llmtune.data.first_rows import first_rows
from llmtune.data.row import Message, Row, Tool
from llmtune.errors import RecipeError, nearest
from llmtune.files import read_json
from llmtune.inference.placement import load_placed, place
from llmtune.inference.switch import AsBase, load_switchable
from llmtune.machine.device import forked_rng
from llmtune.model.files.fingerprints import refuse_other_base
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.recipe.sections import Recipe
from llmtune.run import Run

READ_ROWS = 300
"""Rows of each held-out source that are read for their system prompt and tools."""
TOO_LONG = "(the conversation fills the model's context; /reset starts a new one)"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; raises ValueError for a value that no model can follow."""

    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0 <= self.temperature < math.inf, "a number from 0 on"),
            "top_p": (0 < self.top_p <= 1, "a number above 0, up to 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "a whole number from 1 on"),
            "seed": (0 <= self.seed < 2**63, "a whole number from 0 on"),
        }
        for name, (fits, expected) in limits.items():
            if not fits:
                raise ValueError(f"{name} is {expected}, not {getattr(self, name)}")

    def changed(self, text: str) -> Self:
        """The same with values from `temperature=0.7 top_p=0.9`; raises ValueError in one line."""
        values: dict[str, Any] = {}
        for pair in text.split():
            name, _, value = pair.partition("=")
            if name not in asdict(self):
                raise ValueError(f"there is no {name}; {', '.join(asdict(self))}{nearest(name, list(asdict(self)))}")
            kind = type(asdict(self)[name])
            try:
                values[name] = kind(value)
            except ValueError as error:
                raise ValueError(
                    f"{name}={value}: {'a whole number' if kind is int else 'a number'} is expected"
                ) from error
        return replace(self, **values)

    def in_words(self) -> str:
        """The values as `changed` takes them."""
        return " ".join(f"{name}={value:g}" for name, value in asdict(self).items())


Show = Callable[[str], None]
"""Takes an answer as far as it has come."""
Answer = Callable[[list[Message], Sampling, Show], str]
"""Answers messages and shows the answer while it grows."""


@dataclass
class Speaker:
    """A model in a conversation: its name, the function that answers the turns so far, and those turns."""

    name: str
    answer: Answer
    system: str | None = None
    tools: tuple[Tool, ...] = ()
    """What the model may call, as `answer` tells it."""
    turns: list[Message] = field(default_factory=list)

    def reply(self, line: str, sampling: Sampling | None = None, show: Show = lambda _: None) -> str:
        """Answer one more line of the user and keep both as turns; Ctrl-C keeps the answer as far as it came."""
        turns: list[Message] = [*self.turns, {"role": "user", "content": line}]
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system is not None else []
        so_far = ""

        def watch(text: str) -> None:
            nonlocal so_far
            so_far = text
            show(text)

        try:
            answer = self.answer(opening + turns, sampling or Sampling(), watch)
        except KeyboardInterrupt:
            answer = so_far
        if answer != TOO_LONG:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer


def load_speakers(run: Run) -> list[Speaker]:
    """Load base and tuned model of a run as one: the adapter, or the trained tensors, are switched off for the base."""
    settings = run.recipe()
    base = locate_base(settings.model)
    refuse_other_base(run.manifest().get("base"), base, run.path, RecipeError)
    placement = place(settings, base)
    if placement.note:
        print(f"chat: {placement.note}", file=sys.stderr, flush=True)
    tokenizer, stop = load_tokenizer(base), stop_ids(base)
    model, as_base = load_switchable(load_placed(base, settings, placement), run.delta)
    system, tools = shared_opening(settings)
    block = str(read_json(run.data_file).get("thinking_block", "")) if run.data_file.exists() else ""
    opening = (settings.data.template, tools, block)
    return [
        Speaker("base", _answerer(model, tokenizer, stop, as_base, *opening), system, tools),
        Speaker("tuned", _answerer(model, tokenizer, stop, nullcontext, *opening), system, tools),
    ]


def shared_opening(settings: Recipe) -> tuple[str | None, tuple[Tool, ...]]:
    """Return the system prompt and the tools that the first held-out conversations of each source share.

    Neither where they differ, or where no row can be read.
    """
    data = settings.data
    rows = [row for row in first_rows(data, data.held_out_part, READ_ROWS) if row.messages]
    systems = {_system(row) for row in rows}
    tools = {json.dumps(row.tools): row.tools for row in rows}
    return systems.pop() if len(systems) == 1 else None, next(iter(tools.values())) if len(tools) == 1 else ()


def _system(row: Row) -> str | None:
    first = row.messages[0]
    return first["content"] if first["role"] == "system" else None


class _Watcher:
    """A streamer of `generate` that decodes all tokens anew at each: pieces alone would lose spaces and accents."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show) -> None:
        self.tokenizer, self.show, self.ids, self.text = tokenizer, show, list[int](), ""
        self.prompt_is_next = True

    def put(self, ids: torch.Tensor) -> None:
        """Take the prompt first, then one token after the other."""
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        self.ids += ids.flatten().tolist()
        self.text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True)).strip()
        if not self.text.endswith("\ufffd"):  # half of a character
            self.show(self.text)

    def end(self) -> None:
        """Take the end of the answer."""


def _answerer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    mode: AsBase,
    template: Mapping[str, Any],
    tools: Sequence[Tool],
    block: str,
) -> Answer:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def answer(messages: list[Message], sampling: Sampling, show: Show) -> str:
        context = messages if tokenizer.chat_template else messages[-1:]
        ids = torch.tensor([prompt_ids(context, tokenizer, template, tools, block)], device=model.device)
        room = min(sampling.max_new_tokens, limit - ids.shape[1])
        if room < 1:
            return TOO_LONG
        watcher = _Watcher(tokenizer, show)
        # Trained tensors are changed outside of inference mode, whose tensors cannot leave it.
        with mode(), torch.inference_mode(), _seeded(sampling.seed + len(messages), model.device):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                eos_token_id=sorted(stop),
                pad_token_id=tokenizer.pad_token_id,
                streamer=watcher,
                **_draws(sampling),
            )
        return watcher.text

    return answer


def _draws(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed, and leave the random state as it was."""
    with forked_rng(device):
        torch.manual_seed(seed)
        yield
