"""Options that take all the words behind them: --weights 0.7 0.3."""

from collections.abc import Callable
from typing import Any, ClassVar

from typer.core import TyperCommand


class Several(TyperCommand):
    """A command with one option that takes all the fitting words behind it."""

    option: ClassVar[str]

    @staticmethod
    def fits(word: str) -> bool:
        """Whether a further word belongs to the option."""
        raise NotImplementedError

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words after each one behind the option got an option of its own."""
        return super().parse_args(ctx, spread(args, self.option, self.fits))


def spread(words: list[str], option: str, fits: Callable[[str], bool]) -> list[str]:
    """The words with `--option a b` written as `--option=a --option=b`, for the further words that fit."""
    options: list[str] = []
    begins = goes_on = False
    for word in words:
        if word == option:
            begins = True
        elif begins or (goes_on and fits(word)):
            options.append(f"{option}={word}")
            begins, goes_on = False, True
        else:
            options.append(word)
            goes_on = word.startswith(f"{option}=")
    return [*options, *([option] if begins else [])]
