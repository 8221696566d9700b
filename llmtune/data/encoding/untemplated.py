"""A prompt and its completion as one text, for a tokenizer without a chat template."""

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.conversation import Conversation
from llmtune.data.row import Row
from llmtune.errors import RecipeError


def pair(row: Row, tokenizer: PreTrainedTokenizerBase, stop: set[int]) -> Conversation:
    """Return prompt and completion as one text; raises RecipeError for a row that is more than that."""
    if tokenizer.eos_token_id not in stop:
        stops = " or ".join(repr(tokenizer.decode([token])) for token in sorted(stop))
        raise RecipeError(
            f"the tokenizer ends a text with {tokenizer.eos_token!r}, but the model stops at {stops}: "
            "the tuned model would not stop"
        )
    if [message["role"] for message in row.messages] != ["user", "assistant"]:
        raise RecipeError(
            f"{row.where}: the tokenizer has no chat template, so a row must be one prompt and one completion; "
            "use an instruct model for conversations"
        )
    fields = [name for name in ("reasoning_content", "tool_calls") if row.messages[1].get(name)]
    for name in [*fields, *["tools"][: len(row.tools)]]:
        raise RecipeError(f"{row.where}: has {name}, but the tokenizer has no chat template that could render them")
    prompt = row.messages[0]["content"]
    return Conversation(prompt + row.answer, len(prompt), len(prompt))
