"""The message of every error is one clean line, whatever values a user's files put into it."""

import pytest

from llmtune.errors import LONGEST_MESSAGE, FieldError, LlmtuneError, MachineError, RecipeError


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31mred\x00\x7f\x85", "\\x1b[31mred\\x00\\x7f\\x85"),
        ("half \ud800", "half \\ud800"),
        ("text\u2028", "text\\u2028"),
        ("Größe, हिन्दी, 數據, \U0001f600", "Größe, हिन्दी, 數據, \U0001f600"),
    ],
)
def test_writes_control_characters_out(message: str, line: str) -> None:
    assert str(LlmtuneError(message)) == line


@pytest.mark.parametrize("value", ["x" * 100_000, "\x00" * 100_000, "\n" * 999], ids=["long", "escaped", "grows"])
def test_cuts_the_middle_of_a_long_message(value: str) -> None:
    text = str(RecipeError(f"recipe.yaml:3: train.seed: {value} is no number; try 1"))
    assert text.startswith("recipe.yaml:3: train.seed: ")
    assert text.endswith(" is no number; try 1")
    assert " ... " in text
    assert len(text) <= LONGEST_MESSAGE


def test_field_error_keeps_key_and_exit_code() -> None:
    error = FieldError("model.base", "a\nb", MachineError)
    assert str(error) == "model.base: a\\nb"
    assert error.exit_code == 3
