"""The errors a user can cause, each with the exit code of its kind."""


class LlmtuneError(Exception):
    """A failure that is told in one line and ends the command with its class's exit code."""

    exit_code = 1


class RecipeError(LlmtuneError):
    """The recipe or the data is wrong."""

    exit_code = 2


class FieldError(RecipeError):
    """A mistake at a dotted key of the recipe; who holds the recipe adds file and line (`Recipe.located`)."""

    def __init__(self, key: str, message: str, kind: type[LlmtuneError] = RecipeError) -> None:
        super().__init__(f"{key}: {message}")
        self.key, self.message, self.kind = key, message, kind
        self.exit_code = kind.exit_code


class MachineError(LlmtuneError):
    """The machine lacks something: GPU, disk, memory, a package, the network."""

    exit_code = 3


class TrainingError(LlmtuneError):
    """Training failed or would have taught nothing."""

    exit_code = 4


class ProofError(LlmtuneError):
    """Evaluation, merge or parity failed."""

    exit_code = 5


class PublishError(LlmtuneError):
    """Publishing failed; what was trained is untouched."""

    exit_code = 6


class Interrupted(LlmtuneError):  # noqa: N818
    """The user stopped the run; a checkpoint holds what was reached."""

    exit_code = 130


def nearest(word: str, known: list[str]) -> str:
    """A did-you-mean ending for a message, empty when nothing in `known` is close."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class PlanError(ValueError):
    """A method that makes no sense or that the model cannot follow; `key` is the dotted key within its section."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
