"""Says why a model could not learn an answer as the chat template renders it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llmtune.data.encoding.rendering.reasoning import split_thought
from llmtune.data.row import Message

_SHOWN = 30
"""Characters of a text in a message."""


def explain(
    prompt: str, rendered: str, message: Message, stops: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> str:
    """Say why the model could not learn the last answer of a rendered conversation."""
    shown_stops = " or ".join(repr(stop) for stop in stops)
    if not rendered.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, rendered, strict=False)) if a != b), len(rendered))
        before, after = prompt[at : at + _SHOWN], rendered[at : at + _SHOWN]
        off = "enable_thinking" in str(tokenizer.chat_template) and prompt.rstrip().endswith("<think>")
        hint = "; try data.template: {enable_thinking: false}" if off else ""
        what = "the chat template changes the text before an answer"
        return f"{what}: {before!r} becomes {after!r} once it is given{hint}"
    if message.get("tool_calls"):
        rest = rendered[len(prompt) :]
        if any(stop in rest for stop in stops):
            return f"the tuned model would stop before the end of tool calls, at {shown_stops}"
        return (
            f"the chat template ends tool calls with {rest[-_SHOWN:].strip()!r}, but the model stops at {shown_stops}"
        )
    answer = split_thought(message)[1].strip()
    at = rendered.find(answer, len(prompt))
    if at < 0:
        return f"the chat template changes the answer: the rendered text does not contain {answer[:_SHOWN]!r}"
    rest = rendered[at + len(answer) :][:200].strip()
    first = tokenizer.decode(tokenizer(rest, add_special_tokens=False)["input_ids"][:1]) if rest else ""
    ends = f"ends an answer with {first!r}" if first else "puts nothing after an answer"
    return f"the chat template {ends}, but the model stops at {shown_stops}: the tuned model would not stop"
