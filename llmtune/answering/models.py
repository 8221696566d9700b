"""Base and tuned model of a run in memory as one, with what their prompts depend on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.encoding.encode import prompt_ids
from llmtune.data.first_rows import first_rows
from llmtune.data.row import Message, Row, Tool
from llmtune.errors import RecipeError
from llmtune.files import read_json
from llmtune.inference.placement import Placement, load_placed, place
from llmtune.inference.switch import AsBase, load_switchable
from llmtune.model.base import Base
from llmtune.model.files.fingerprints import refuse_other_base
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.recipe.sections import Recipe
from llmtune.run import Run

READ_ROWS = 300
"""Rows of each held-out source that are read for their system prompt and tools."""


@dataclass(frozen=True)
class Prompts:
    """Turns conversations into the token ids that answers start from, as training rendered them."""

    tokenizer: PreTrainedTokenizerBase
    stop: set[int]
    template: Mapping[str, Any]
    """The values of `data.template`."""
    reasoning: str
    """The value of `data.reasoning`."""
    block: str
    """The empty thinking block behind which the answers start that were trained."""

    def ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the token ids of messages; raises RecipeError where the chat template rejects them."""
        return prompt_ids(messages, self.tokenizer, self.template, tools, self.block, self.reasoning)


@dataclass(frozen=True)
class Models:
    """The tuned model of a run, and what makes it the base for a while."""

    model: PreTrainedModel | PeftModel
    as_base: AsBase


def find_base(run: Run) -> Base:
    """Return the base of a run; raises RecipeError where it is another one than was trained on."""
    base = locate_base(run.recipe().model)
    refuse_other_base(run.manifest().get("base"), base, run.path, RecipeError)
    return base


def read_prompts(run: Run, base: Base) -> Prompts:
    """Return what renders prompts for the models of a run."""
    data = run.recipe().data
    block = str(read_json(run.data_file).get("thinking_block", "")) if run.data_file.exists() else ""
    return Prompts(load_tokenizer(base), stop_ids(base), data.template, data.reasoning, block)


def load_models(run: Run, base: Base, placement: Placement | None = None) -> Models:
    """Load base and tuned model as evaluation does, as one in memory: what was trained is switched off for the base."""
    settings = run.recipe()
    placement = placement or place(settings, base)
    model, as_base = load_switchable(load_placed(base, settings, placement), run.delta)
    settings.method.adapter.match_precision(model, placement.dtype)
    return Models(model, as_base)


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
