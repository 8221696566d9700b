"""Public chat templates by kinds of rows: what is supervised is what the recipe says, or a row is refused by name."""

from typing import Any

import pytest

from llmtune.data.encoding.encode import IGNORED, Example, encode, prompt_ids
from llmtune.data.encoding.rules import Rules
from llmtune.data.row import Row
from llmtune.errors import RecipeError
from tests.data.test_encode import learned_text, make_tokenizer
from tests.support.public_templates import PUBLIC, Public

CALL = ("get_weather", {"city": 'Par"is'})
THOUGHT, RESULT = "hmm", "21 degrees, clear"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(text: str) -> dict[str, Any]:
    """A user's turn."""
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    """An assistant's turn."""
    return {"role": "assistant", "content": text, **more}


CALLS = says(
    "", tool_calls=[{"type": "function", "id": "call12345", "function": {"name": CALL[0], "arguments": CALL[1]}}]
)
RETURNS = {"role": "tool", "content": RESULT, "name": CALL[0], "tool_call_id": "call12345"}
MIDDLE = (user("Q1"), CALLS, RETURNS, says("A2"))
KINDS: dict[str, Row] = {
    "one turn": Row("r", (user("Q1"), says("A1")), "t:1"),
    "several turns": Row("r", (user("Q1"), says("A1"), user("Q2"), says("A2")), "t:1"),
    "system": Row("r", ({"role": "system", "content": "Be brief."}, user("Q1"), says("A1")), "t:1"),
    "reasoning": Row("r", (user("Q1"), says("A1", reasoning_content=THOUGHT)), "t:1"),
    "inline reasoning": Row("r", (user("Q1"), says(f"<think>\n{THOUGHT}\n</think>\n\nA1")), "t:1"),
    "tool call": Row("r", (user("Q1"), CALLS), "t:1", tools=(TOOL,)),
    "tool in the middle": Row("r", MIDDLE, "t:1", tools=(TOOL,)),
    "tool in the middle, no tools": Row("r", MIDDLE, "t:1"),
    "plain text": Row("r", (), "t:1", text="One document."),
}
LEARN, REASONING = ("answers", "last_answer", "all"), ("learn", "context", "drop")


def refusal(public: Public, kind: str, reasoning: str) -> str | None:
    """The words with which a kind of row is refused, by what a template can write; None where it is not."""
    asked = "one turn" if reasoning == "drop" and "reasoning" in kind else kind
    if asked in public.refused:
        return public.refused[asked]
    if asked == "reasoning" and public.thought is None:
        return "has reasoning_content, but the chat template does not render it; use data.reasoning: drop"
    if KINDS[asked].tools and not public.takes_tools:
        return "has tools, but the chat template takes no tools"
    if "tool" in asked and public.call is None:
        return r"does not render tool_calls \('get_weather'\)|does not render"
    return None


def spoken(public: Public, row: Row, reasoning: str) -> list[tuple[str, str]]:
    """What the model says in each answer of a row: its reasoning, and the rest up to the token that ends it."""
    answers = []
    for message in (message for message in row.messages if message["role"] == "assistant"):
        thought, rest = "", f"{public.before}{message['content'].rpartition('</think>')[2].strip()}{public.end}"
        if message.get("tool_calls"):
            assert public.call is not None
            rest = public.call(*CALL) + (public.stops or (public.end,))[-1]
        if reasoning == "drop":
            pass
        elif message.get("reasoning_content"):
            assert public.thought is not None
            thought = public.thought(THOUGHT)
        elif "<think>" in message["content"]:
            write = public.inline or (lambda text: f"<think>\n{text}\n</think>\n\n")
            thought, rest = public.before + write(THOUGHT), rest.removeprefix(public.before)
        answers.append((thought, rest))
    return answers


def expected(public: Public, row: Row, learn: str, reasoning: str, texts: list[str], is_partly: bool) -> str:
    """The text that is supervised in all examples of a row, whose complete texts are given."""
    if row.text is not None:
        return row.text + public.special[1]
    answers = spoken(public, row, reasoning)
    has_thought = any(thought for thought, _ in answers)
    if learn == "all":
        (text,) = texts
        assert text.count(RESULT) == sum(message["role"] == "tool" for message in row.messages)
        text = text.replace(RESULT, "")
        if public.block and not has_thought:
            text = text.replace(public.block, "")
        return text.replace(answers[-1][0], "", 1) if has_thought and reasoning == "context" else text
    said = ["" if reasoning == "context" else thought for thought, _ in answers]
    complete = [thought + rest for thought, (_, rest) in zip(said, answers, strict=True)]
    return "".join(complete[-1:] if learn == "last_answer" or is_partly else complete)


def public_tokenizer(public: Public) -> Any:
    """A byte-level tokenizer with a template and its special tokens, and the ids at which generation stops."""
    tokenizer = make_tokenizer(public.template, public.special)
    return tokenizer, set(tokenizer.convert_tokens_to_ids(list(public.stops or (public.end,))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLIC)
def test_supervises_what_the_recipe_says_or_refuses_by_name(name: str, kind: str) -> None:
    public, row = PUBLIC[name], KINDS[kind]
    tokenizer, stop = public_tokenizer(public)
    for reasoning in REASONING:
        for learn in LEARN:
            rules = Rules(4096, learn=learn, reasoning=reasoning)
            words = refusal(public, kind, reasoning)
            if words is not None:
                with pytest.raises(RecipeError, match=words) as caught:
                    encode([row], tokenizer, stop, rules)
                assert str(caught.value).startswith("t:1: ")
                continue
            encoded = encode([row], tokenizer, stop, rules)
            texts = [tokenizer.decode(example.input_ids) for example in encoded.examples]
            said = "".join(learned_text(example, tokenizer) for example in encoded.examples)
            is_partly = learn == "answers" and kind in public.partly
            assert said == expected(public, row, learn, reasoning, texts, is_partly), (learn, reasoning)
            assert encoded.partly_learned == ["r"] * is_partly
            if row.text is None:
                check_text(row, encoded.examples[-1], tokenizer, rules, encoded.thinking_block)


def check_text(row: Row, example: Example, tokenizer: Any, rules: Rules, block: str) -> None:
    """An example ends in a learned stop token, and starts with the ids from which generation starts."""
    assert example.labels[-1] == example.input_ids[-1] != IGNORED
    has_thought = "hmm" in tokenizer.decode(example.input_ids[example.prompt_size :])
    prompt = prompt_ids(row.prompt, tokenizer, rules.template, row.tools, "" if has_thought else block)
    assert example.input_ids[: example.prompt_size] == prompt
