"""Base and tuned model of a run as speakers: each answers in its own conversation, token by token."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.answering.models import Prompts, find_base, load_models, read_prompts
from llmtune.answering.sampling import Sampling
from llmtune.data.first_rows import shared_opening
from llmtune.data.row import Message, Tool
from llmtune.inference.placement import place
from llmtune.inference.switch import AsBase
from llmtune.machine.device import forked_rng
from llmtune.run import Run

TOO_LONG = "(the conversation fills the model's context; /reset starts a new one)"


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
    base = find_base(run)
    placement = place(run.recipe(), base)
    if placement.note:
        print(f"chat: {placement.note}", file=sys.stderr, flush=True)
    models, prompts = load_models(run, base, placement), read_prompts(run, base)
    system, tools = shared_opening(run.recipe().data)
    return [
        Speaker("base", _answerer(models.model, prompts, models.as_base, tools), system, tools),
        Speaker("tuned", _answerer(models.model, prompts, nullcontext, tools), system, tools),
    ]


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


def _answerer(model: PreTrainedModel | PeftModel, prompts: Prompts, mode: AsBase, tools: Sequence[Tool]) -> Answer:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    tokenizer, stop = prompts.tokenizer, sorted(prompts.stop)

    def answer(messages: list[Message], sampling: Sampling, show: Show) -> str:
        context = messages if tokenizer.chat_template else messages[-1:]
        ids = torch.tensor([prompts.ids(context, tools)], device=model.device)
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
                eos_token_id=stop,
                pad_token_id=tokenizer.pad_token_id,
                streamer=watcher,
                **_draws(sampling),
            )
        return watcher.text

    return answer


def _draws(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return {"do_sample": True, **chosen}


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed, and leave the random state as it was."""
    with forked_rng(device):
        torch.manual_seed(seed)
        yield
