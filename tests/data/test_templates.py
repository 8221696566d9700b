"""Public chat templates by kinds of rows: what is supervised is what the recipe says, or a row is refused by name."""

from typing import Any

import pytest

from llmtune.data.encoding.encode import IGNORED, Example, encode, prompt_ids
from llmtune.data.encoding.rules import Rules
from llmtune.data.row import Row
from llmtune.errors import FieldError, RecipeError
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


def expected(public: Public, row: Row, learn: str, reasoning: str, texts: list[str]) -> str:
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
    return "".join(complete if learn == "answers" else complete[-1:])


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
            if learn == "answers" and kind in public.partly:
                words = "changes the text before an answer"
            if words is not None:
                with pytest.raises(RecipeError, match=words) as caught:
                    encode([row], tokenizer, stop, rules)
                assert str(caught.value).startswith("t:1: ")
                continue
            encoded = encode([row], tokenizer, stop, rules)
            texts = [tokenizer.decode(example.input_ids) for example in encoded.examples]
            said = "".join(learned_text(example, tokenizer) for example in encoded.examples)
            assert said == expected(public, row, learn, reasoning, texts), (learn, reasoning)
            assert encoded.partly_learned == []
            if row.text is None:
                check_text(row, encoded.examples[-1], tokenizer, rules, encoded.thinking_block)


def check_text(row: Row, example: Example, tokenizer: Any, rules: Rules, block: str) -> None:
    """An example ends in a learned stop token, and starts with the ids from which generation starts."""
    assert example.labels[-1] == example.input_ids[-1] != IGNORED
    has_thought = "hmm" in tokenizer.decode(example.input_ids[example.prompt_size :])
    prompt = prompt_ids(row.prompt, tokenizer, rules.template, row.tools, "" if has_thought else block)
    assert example.input_ids[: example.prompt_size] == prompt


TALK = Row(
    "r", tuple(turn for n in "123" for turn in (user("Q" + n), says("A" + n, reasoning_content="why" + n))), "t:1"
)


@pytest.mark.parametrize(("name", "count"), [("qwen3", 3), ("qwen3.5", 3), ("gpt-oss", 3), ("smollm3", 1)])
def test_a_conversation_becomes_an_example_a_turn_where_earlier_thoughts_are_dropped(name: str, count: int) -> None:
    public = PUBLIC[name]
    tokenizer, stop = public_tokenizer(public)
    encoded = encode([TALK], tokenizer, stop, Rules(4096))
    said = [learned_text(example, tokenizer) for example in encoded.examples]
    assert public.thought is not None
    answers = [f"{public.thought('why' + n)}{public.before}A{n}{public.end}" for n in "123"]
    assert said == (answers if count == 3 else ["".join(answers)])
    assert [example.id for example in encoded.examples] == (["r#1", "r#2", "r#3"] if count == 3 else ["r"])
    assert encoded.split_rows == ["r"] * (count > 1)
    lengths = [len(example.input_ids) for example in encoded.examples]
    assert (encoded.tokens, encoded.split_tokens) == (sum(lengths), sum(lengths[:-1]))
    cost = f"become 3 examples, since the template drops or rewrites earlier turns: {sum(lengths) / lengths[-1]:.1f}x"
    assert [cost in note for note in encoded.notes()] == [True] * (count > 1)
    last = encode([TALK], tokenizer, stop, Rules(4096, learn="last_answer"))
    assert [learned_text(example, tokenizer) for example in last.examples] == answers[-1:]
    short = encode([TALK], tokenizer, stop, Rules(lengths[-1] - 1, "truncate_turns"))
    assert short.cut_at_turn == ["r"]
    assert short.dropped == []
    assert "".join(learned_text(example, tokenizer) for example in short.examples) == "".join(answers[:2])


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_thoughts_before_a_call_and_after_its_result_are_learned_once(name: str) -> None:
    public = PUBLIC[name]
    tokenizer, stop = public_tokenizer(public)
    messages = (user("Q1"), CALLS | {"reasoning_content": "why1"}, RETURNS, says("A2", reasoning_content="why2"))
    row = Row("r", messages, "t:1", tools=(TOOL,))
    assert public.thought is not None
    assert public.call is not None
    call = public.call(*CALL) + (public.stops or (public.end,))[-1]
    rest = [call, public.before + "A2" + public.end]
    thoughts = [public.thought("why1"), public.thought("why2")]
    for reasoning in REASONING:
        encoded = encode([row], tokenizer, stop, Rules(4096, reasoning=reasoning))
        said = "".join(learned_text(example, tokenizer) for example in encoded.examples)
        with_thoughts = "".join(a + b for a, b in zip(thoughts, rest, strict=True))
        assert said == (with_thoughts if reasoning == "learn" else "".join(rest))
        assert len(encoded.examples) == 1
        text = "".join(tokenizer.decode(example.input_ids) for example in encoded.examples)
        assert ("why1" in text) == (reasoning != "drop")


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "smollm3"])
def test_without_thinking_the_block_stands_in_the_prompt(name: str) -> None:
    tokenizer, stop = public_tokenizer(PUBLIC[name])
    rules = Rules(4096, template={"enable_thinking": False})
    row = KINDS["several turns"]
    encoded = encode([row], tokenizer, stop, rules)
    assert "".join(learned_text(example, tokenizer) for example in encoded.examples) == "A1<|im_end|>A2<|im_end|>"
    assert encoded.thinking_block == ""
    example = encoded.examples[-1]
    assert "</think>" in tokenizer.decode(example.input_ids[: example.prompt_size])[-12:]
    assert example.input_ids[: example.prompt_size] == prompt_ids(row.prompt, tokenizer, rules.template)


def test_values_for_the_template_are_rendered_or_refused_by_name() -> None:
    tokenizer, stop = public_tokenizer(PUBLIC["llama3"])
    (example,) = encode([KINDS["one turn"]], tokenizer, stop, Rules(4096, template={"date_string": "1 May"})).examples
    assert "Today Date: 1 May\n" in tokenizer.decode(example.input_ids)
    with pytest.raises(FieldError, match=r"data\.template\.date_sting: .* not use .*; did you mean 'date_string'"):
        encode([KINDS["one turn"]], tokenizer, stop, Rules(4096, template={"date_sting": "1 May"}))
    for key in ("messages", "tools", "add_generation_prompt", "bos_token", "tokenize", "enable_thinking"):
        words = rf"data\.template\.{key}: the chat template does not use '{key}' \(it takes date_string\)"
        with pytest.raises(FieldError, match=words):
            encode([KINDS["one turn"]], tokenizer, stop, Rules(4096, template={key: 1}))
    chatml, end = public_tokenizer(PUBLIC["chatml"])
    with pytest.raises(FieldError, match="it takes no values"):
        encode([KINDS["one turn"]], chatml, end, Rules(4096, template={"date_string": 1}))
    with pytest.raises(FieldError, match="the tokenizer has no chat template"):
        encode([KINDS["one turn"]], make_tokenizer(None), {1}, Rules(4096, template={"date_string": 1}))


@pytest.mark.parametrize(
    ("name", "kind", "old", "new", "words"),
    [
        ("granite", "tool call", "tools | tojson(indent=4)", "tools[0].function.name", "the description of tools"),
        (
            "granite",
            "tool in the middle",
            "+ m.content",
            "+ (m.content if m.role != 'tool' else '')",
            "a tool's result",
        ),
        ("granite", "tool call", "f.arguments | tojson", "'{}'", r"tool_calls \('Par\"is'\)"),
        ("chatml", "system", "in messages %}", "in messages if m.role != 'system' %}", "the system turn"),
    ],
)
def test_a_field_that_a_template_leaves_out_is_refused_by_name(
    name: str, kind: str, old: str, new: str, words: str
) -> None:
    public = PUBLIC[name]
    assert old in public.template
    tokenizer, stop = public_tokenizer(public)
    tokenizer.chat_template = public.template.replace(old, new)
    with pytest.raises(RecipeError, match=f"t:1: the chat template does not render {words}"):
        encode([KINDS[kind]], tokenizer, stop, Rules(4096))


def test_a_call_at_whose_end_the_model_does_not_stop_is_refused() -> None:
    tokenizer, _ = public_tokenizer(PUBLIC["gpt-oss"])
    with pytest.raises(
        RecipeError, match=r"ends tool calls with '.*<\|call\|>', but the model stops at '<\|return\|>'"
    ):
        encode([KINDS["tool call"]], tokenizer, {1}, Rules(4096))
    two = says("", tool_calls=CALLS["tool_calls"] * 2)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% set c = m.tool_calls[0] %}", "{% for c in m.tool_calls %}"
    ).replace("'<|call|>' }}", "'<|call|>' }}{% endfor %}")
    with pytest.raises(RecipeError, match="would stop before the end of tool calls"):
        encode([Row("r", (user("Q"), two), "t:1")], tokenizer, {1, 6}, Rules(4096))


def test_everything_but_results_is_learned_of_a_long_conversation() -> None:
    tokenizer, stop = public_tokenizer(PUBLIC["qwen3"])
    turns = [turn for _ in range(30) for turn in (user("Q"), CALLS, RETURNS | {"content": f"  {RESULT}\n"}, says("A"))]
    for _ in range(2):
        (example,) = encode(
            [Row("r", tuple(turns), "t:1", tools=(TOOL,))], tokenizer, stop, Rules(99_999, learn="all")
        ).examples
        text = tokenizer.decode(example.input_ids)
        assert text.count(f"  {RESULT}\n") == len(turns) // 4
        said = text.replace(f"  {RESULT}\n", "").replace("<think>\n\n</think>\n\n", "")
        assert learned_text(example, tokenizer) == said
        turns = turns[-4:]
    whole = encode([Row("r", tuple(turns), "t:1", tools=(TOOL,))], tokenizer, stop, Rules(99_999, learn="all"))
    size = len(whole.examples[0].input_ids)
    row = Row("r", tuple(turns * 3), "t:1", tools=(TOOL,))
    cut = encode([row], tokenizer, stop, Rules(size + 3, "truncate_turns", learn="all"))
    assert (cut.examples[0].input_ids, cut.examples[0].labels) == (
        whole.examples[0].input_ids,
        whole.examples[0].labels,
    )
