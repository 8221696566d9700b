"""What stands before rows that have no system prompt or tools of their own."""

from dataclasses import dataclass, replace

from llmtune.answering.request import Request
from llmtune.answering.rows import RowsSurvey
from llmtune.data.first_rows import first_rows, shared_opening
from llmtune.data.row import Message, Row, Tool
from llmtune.errors import RecipeError, one_line
from llmtune.recipe.sections import Recipe

_SHOWN = 100
"""Characters of a system prompt that a note shows."""


@dataclass(frozen=True)
class Opening:
    """What stands before rows that have none of their own, and whether plain texts are continued as they are."""

    system: str = ""
    tools: tuple[Tool, ...] = ()
    continues_texts: bool = False

    def put_before(self, row: Row) -> Row:
        """Return a row as a conversation with this opening; a plain text becomes the user's turn."""
        turns: tuple[Message, ...] = row.messages or (
            {"role": "user", "content": row.text},
            {"role": "assistant", "content": ""},
        )
        if self.system and turns[0]["role"] != "system":
            turns = ({"role": "system", "content": self.system}, *turns)
        return replace(row, text=None, messages=turns, tools=row.tools or self.tools)


def choose_opening(recipe: Recipe, rows: RowsSurvey, request: Request, has_template: bool) -> Opening:
    """Return the opening for rows: where none has one, the one that the run's own rows share.

    Says what it adds. Raises RecipeError for a system prompt that no chat template takes.
    """
    if request.system and not has_template:
        raise RecipeError("--system: the tokenizer has no chat template, so a prompt is one text alone")
    system, tools = shared_opening(recipe.data) if has_template else (None, ())
    tools = () if rows.has_tools else tools
    system = None if rows.has_system else system
    if request.system is not None:
        system = request.system
    elif system:
        words = one_line(system, _SHOWN)
        print(f"no row has a system prompt, so each gets the one of the run's rows: {words}", flush=True)
    if tools:
        names = ", ".join(str(tool["function"]["name"]) for tool in tools)
        print(f"no row has tools, so each gets those of the run's rows: {names}", flush=True)
    return Opening(system or "", tools, rows.has_text and (not has_template or _learned_texts(recipe)))


def _learned_texts(recipe: Recipe) -> bool:
    """Whether the run learned plain texts."""
    return any(row.text is not None for row in first_rows(recipe.data, recipe.data.held_out_part, 1))
