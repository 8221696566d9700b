"""chat(run): base and tuned model answer the same line side by side, each in its own conversation."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapters.delta import load_delta
from llmtune.data.encode import prompt_ids
from llmtune.data.rows import Message, Row, read
from llmtune.data.sources import problem
from llmtune.model.base import computes_bf16, load_model, load_tokenizer, locate_base, stop_ids
from llmtune.recipe.sections import Recipe
from llmtune.run import Run, locates_mistakes

NEW_TOKENS = 256
HELP = "Base and tuned model answer each line. /reset starts a new conversation, /quit ends the chat."
NOTHING = "(nothing)"
TOO_LONG = "(the conversation fills the model's context; /reset starts a new one)"


@dataclass
class Speaker:
    """A model in a conversation: its name, the function that answers the turns so far, and those turns."""

    name: str
    answer: Callable[[list[Message]], str]
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def reply(self, line: str) -> str:
        """Answer one more line of the user and keep both as turns."""
        turns = [*self.turns, {"role": "user", "content": line}]
        opening = [{"role": "system", "content": self.system}] if self.system is not None else []
        answer = self.answer(opening + turns)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer


@locates_mistakes
def chat(run: Run, lines: Iterable[str] | None = None) -> None:
    """Answer lines, typed ones without `lines`, until /quit, the end of the input or Ctrl-C."""
    console = Console(highlight=False)
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        talk(load_speakers(run), _typed_lines(console) if lines is None else lines, console)
    if console.is_terminal:
        console.print()


def talk(speakers: list[Speaker], lines: Iterable[str], console: Console) -> None:
    """Let every speaker answer each line, in panels on a terminal and in plain lines elsewhere."""
    system = speakers[0].system
    opening = [HELP, *([f"System prompt: {system}"] if system else [])]
    console.print(*opening, sep="\n", markup=False, style="dim", soft_wrap=True)
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if line == "/reset":
            for speaker in speakers:
                speaker.turns = []
            console.print("A new conversation.", style="dim")
        elif line:
            _show(console, [(speaker.name, speaker.reply(line) or NOTHING) for speaker in speakers])


def load_speakers(run: Run) -> list[Speaker]:
    """Load base and tuned model of a run; an adapter shares the base's weights, other deltas need a second copy."""
    settings = run.recipe()
    base = locate_base(settings.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if computes_bf16(settings.model.precision) else torch.float32
    tokenizer, stop = load_tokenizer(base), stop_ids(base)
    tuned: Any = load_delta(load_model(base, dtype), run.delta).to(device)
    shared = isinstance(tuned, PeftModel)
    plain: Any = tuned if shared else load_model(base, dtype).to(device)
    as_base = tuned.disable_adapter if shared else nullcontext
    system = system_prompt(settings)
    return [
        Speaker("base", _answerer(plain, tokenizer, stop, as_base), system),
        Speaker("tuned", _answerer(tuned, tokenizer, stop, nullcontext), system),
    ]


def system_prompt(settings: Recipe) -> str | None:
    """Return the system prompt that all test rows of the run share; None if they differ or cannot be read."""
    source = settings.data.test or settings.data.eval or settings.data.train
    prompts = set() if problem(source) else {_system(row) for row in read(source)}
    return prompts.pop() if len(prompts) == 1 else None


def _system(row: Row) -> str | None:
    first = row.messages[0]
    return first["content"] if first["role"] == "system" else None


def _answerer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stop: set[int],
    mode: Callable[[], AbstractContextManager[Any]],
) -> Callable[[list[Message]], str]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def answer(messages: list[Message]) -> str:
        context = messages if tokenizer.chat_template else messages[-1:]
        ids = torch.tensor([prompt_ids(context, tokenizer)], device=model.device)
        room = min(NEW_TOKENS, limit - ids.shape[1])
        if room < 1:
            return TOO_LONG
        with torch.inference_mode(), mode():
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                eos_token_id=sorted(stop),
                pad_token_id=tokenizer.pad_token_id,
            )
        return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    return answer


def _typed_lines(console: Console) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (importing it gives input() its line editing)

    while True:
        yield console.input("[bold]> [/]")


def _show(console: Console, answers: list[tuple[str, str]]) -> None:
    if console.is_terminal:
        width = console.width // len(answers) - 1
        panels = [
            Panel(Text(text, overflow="fold"), title=name, title_align="left", width=width) for name, text in answers
        ]
        console.print(Columns(panels, padding=(0, 1)))
        return
    for name, text in answers:
        first, *rest = text.splitlines()
        shown = "\n".join([first, *(" " * 7 + line for line in rest)])
        print(f"{name + ':':<7}{shown}", file=console.file, flush=True)
