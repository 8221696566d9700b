"""Base and tuned model of a run in memory as one, with what their prompts depend on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.encoding.encode import prompt_ids
from llmtune.data.findings import thinking_block
from llmtune.data.row import Message, Tool
from llmtune.errors import RecipeError
from llmtune.inference.placement import Placement, load_placed, place
from llmtune.inference.switch import AsBase, load_switchable
from llmtune.model.base import Base
from llmtune.model.files.fingerprints import refuse_other_base
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.run import Run


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
    return Prompts(load_tokenizer(base), stop_ids(base), data.template, data.reasoning, thinking_block(run))


def load_models(run: Run, base: Base, placement: Placement | None = None) -> Models:
    """Load base and tuned model as evaluation does, as one in memory: what was trained is switched off for the base."""
    settings = run.recipe()
    placement = placement or place(settings, base)
    model, as_base = load_switchable(load_placed(base, settings, placement), run.delta)
    settings.method.adapter.match_precision(model, placement.dtype)
    return Models(model, as_base)
