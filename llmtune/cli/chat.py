"""chat(run): base and tuned model answer the same line side by side; a line that starts with / is a command."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from llmtune.answering.sampling import Sampling
from llmtune.answering.speakers import Speaker, load_speakers
from llmtune.cli.screen import show_answers
from llmtune.errors import nearest
from llmtune.evaluation.boundary import lacks_named
from llmtune.run import Run, locates_mistakes

OPENING = "Base and tuned model answer each line. /help lists the commands, /quit ends the chat."
HELP = """/base          only the base model answers; once more: both
/tuned         only the tuned model answers; once more: both
/system TEXT   another system prompt, in a new conversation; without TEXT: shows it
/set A=B ...   temperature=0.7 top_p=0.9 top_k=50 max_new_tokens=100 seed=1; without A=B: shows them
/reset         a new conversation
/help          this list
/quit          ends the chat
Ctrl-C stops an answer. To send a line that starts with /, put a space before it."""
LESS_MEMORY = "ask for shorter answers with --max-new-tokens, or free some memory"


@locates_mistakes
def chat(
    run: Run,
    lines: Iterable[str] | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    alone: str | None = None,
) -> None:
    """Answer lines, typed ones without `lines`, until /quit, the end of the input or Ctrl-C at the prompt.

    `system` takes the place of the system prompt that the run's rows share; `alone` is base or tuned, None for both.
    """
    console = Console(highlight=False)
    safe = f"what was trained is safe in {run.delta}"
    with contextlib.suppress(KeyboardInterrupt, EOFError), lacks_named("chat", f"{LESS_MEMORY}; {safe}"):
        speakers = load_speakers(run)
        for speaker in speakers:
            speaker.system = speaker.system if system is None else system or None
        talk(speakers, _typed_lines(console) if lines is None else lines, console, sampling, alone)
    if console.is_terminal:
        console.print()


def talk(
    speakers: list[Speaker],
    lines: Iterable[str],
    console: Console,
    sampling: Sampling | None = None,
    alone: str | None = None,
) -> None:
    """Let the speakers answer each line, and follow the commands, until /quit or the end of the lines."""
    conversation = Conversation(speakers, console, sampling or Sampling(), alone)
    system, tools = speakers[0].system, [one.get("function", one).get("name") for one in speakers[0].tools]
    opening = OPENING if alone is None else f"Only the {alone} model answers; /{alone} brings the other one back."
    told = [f"System prompt: {system}"] * bool(system)
    told += [f"Tools that the models are told of: {', '.join(map(str, tools))}. None is run here."] * bool(tools)
    conversation.tell(opening, *told)
    for line in lines:
        if line.startswith("/"):
            if line.strip() == "/quit":
                return
            conversation.follow(line.strip())
        elif line.strip():
            show_answers(console, conversation.answering, line.strip(), conversation.sampling)


@dataclass
class Conversation:
    """What the commands of a chat change: who answers, under which system prompt, and how tokens are chosen."""

    speakers: list[Speaker]
    console: Console
    sampling: Sampling
    alone: str | None = None
    """The name of the one speaker that answers; None for all."""

    @property
    def answering(self) -> list[Speaker]:
        """The speakers that answer."""
        return [speaker for speaker in self.speakers if self.alone in (None, speaker.name)]

    def tell(self, *lines: str) -> None:
        """Print lines that no model said."""
        self.console.print(*lines, sep="\n", markup=False, style="dim", soft_wrap=True)

    def follow(self, line: str) -> None:
        """Follow a command, or answer an unknown one with the nearest."""
        word, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.tell(HELP),
            "/reset": lambda _: self._reset("A new conversation."),
            "/system": self._system,
            "/set": self._set,
            **{f"/{speaker.name}": partial(self._only, speaker.name) for speaker in self.speakers},
        }
        if word in commands:
            commands[word](rest.strip())
        else:
            self.tell(f"there is no {word}{nearest(word, [*commands, '/quit']) or '; /help lists the commands'}")

    def _reset(self, message: str) -> None:
        for speaker in self.speakers:
            speaker.turns = []
        self.tell(message)

    def _system(self, text: str) -> None:
        if not text:
            self.tell(f"System prompt: {self.speakers[0].system or '(none)'}")
            return
        for speaker in self.speakers:
            speaker.system = text
        self._reset(f"System prompt: {text}\nA new conversation.")

    def _set(self, text: str) -> None:
        try:
            self.sampling = self.sampling.changed(text)
        except ValueError as error:
            self.tell(str(error))
        else:
            self.tell(self.sampling.in_words())

    def _only(self, name: str, _: str) -> None:
        self.alone = None if self.alone == name else name
        names = [f"the {speaker.name} model" for speaker in self.answering]
        self.tell(f"only {names[0]} answers now" if len(names) == 1 else f"{' and '.join(names)} answer now")


def _typed_lines(console: Console) -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (importing it gives input() its line editing)

    while True:
        yield console.input("[bold]> [/]")
