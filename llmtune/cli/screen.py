"""Answers as they grow: panels side by side on a terminal, plain lines elsewhere."""

from functools import partial

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from llmtune.answering.sampling import Sampling
from llmtune.answering.speakers import Speaker

NOTHING = "(nothing)"
_INDENT = " " * 7


def show_answers(console: Console, speakers: list[Speaker], line: str, sampling: Sampling) -> None:
    """Let each speaker answer a line, one after the other, and show what they say while they say it."""
    if console.is_terminal:
        _show_panels(console, speakers, line, sampling)
        return
    for speaker in speakers:
        _show_lines(console, speaker, line, sampling)


def _show_panels(console: Console, speakers: list[Speaker], line: str, sampling: Sampling) -> None:
    texts = {speaker.name: "" for speaker in speakers}
    with Live(_panels(console, texts), console=console, refresh_per_second=8, vertical_overflow="visible") as live:

        def update(name: str, text: str) -> None:
            texts[name] = text
            live.update(_panels(console, texts))

        for speaker in speakers:
            answer = speaker.reply(line, sampling, partial(update, speaker.name))
            update(speaker.name, answer or NOTHING)


def _panels(console: Console, texts: dict[str, str]) -> Columns:
    width = console.width // len(texts) - 1
    panels = [
        Panel(Text(text, overflow="fold"), title=name, title_align="left", width=width) for name, text in texts.items()
    ]
    return Columns(panels, padding=(0, 1))


def _show_lines(console: Console, speaker: Speaker, line: str, sampling: Sampling) -> None:
    """Print the name, and each piece of the answer once; later lines are indented below the first."""
    print(f"{speaker.name + ':':<{len(_INDENT)}}", end="", file=console.file, flush=True)
    printed = ""

    def show(text: str) -> None:
        nonlocal printed
        piece, printed = text[len(printed) :], text
        print(piece.replace("\n", f"\n{_INDENT}"), end="", file=console.file, flush=True)

    answer = speaker.reply(line, sampling, show)
    show(answer or NOTHING)
    print(file=console.file, flush=True)
