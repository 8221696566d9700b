"""Encoding: only answers and stop tokens are learned, and examples start with the ids from which generation starts."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmtune.data.batches.collate import Collator
from llmtune.data.encoding.encode import IGNORED, Example, encode, prompt_ids
from llmtune.data.encoding.rules import Rules
from llmtune.data.findings import mark_learned
from llmtune.data.row import Row
from llmtune.errors import RecipeError
from tests.support import tiny
from tests.support.templates import GEMMA, LLAMA2, LLAMA3, MISTRAL, THINKING

SPECIAL = {
    tiny.CHATML: ("<|im_start|>", "<|im_end|>"),
    THINKING: ("<|im_start|>", "<|im_end|>"),
    LLAMA3: ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    GEMMA: ("<bos>", "<end_of_turn>", "<start_of_turn>"),
    MISTRAL: ("<s>", "</s>"),
    LLAMA2: ("<s>", "</s>"),
}


def make_tokenizer(
    template: str | None,
    special: tuple[str, ...] = ("<s>", "</s>"),
    adds_bos: bool = False,
    merges: tuple[tuple[str, str], ...] = (),
    bos: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose first special token is BOS and whose second one ends a turn."""
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", pair=f"{special[0]} $A $B", special_tokens=[(special[0], 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0] if bos else None, eos_token=special[1], pad_token=special[1]
    )
    fast.chat_template = template
    return fast


def chat(*texts: str, system: str | None = None) -> Row:
    """A row of user and assistant turns in turn, after an optional system turn."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    first = [{"role": "system", "content": system}] if system is not None else []
    return Row("r", (*first, *turns), "t.jsonl:1")


def encode_one(row: Row, tokenizer: PreTrainedTokenizerFast, stop: set[int] | None = None) -> Example:
    """The example of one row; generation stops at `stop`, or at the EOS token."""
    (example,) = encode([row], tokenizer, stop or {tokenizer.eos_token_id}, Rules(4096, "drop")).examples
    return example


def learned_text(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the learned tokens."""
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


GOLDEN = {
    tiny.CHATML: "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧\n<|im_start|>user\nC<|im_end|>\n"
    "<|im_start|>assistant\n⟦Ünï ✓<|im_end|>⟧",
    LLAMA3: "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦B<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Ünï ✓<|eot_id|>⟧",
    GEMMA: "<bos><start_of_turn>user\nA<end_of_turn>\n<start_of_turn>model\n⟦B<end_of_turn>⟧\n<start_of_turn>user\n"
    "C<end_of_turn>\n<start_of_turn>model\n⟦Ünï ✓<end_of_turn>⟧",
    MISTRAL: "<s>[INST] A [/INST]⟦ B</s>⟧[INST] C [/INST]⟦ Ünï ✓</s>⟧",
    LLAMA2: "<s>[INST] A [/INST]⟦ B </s>⟧<s>[INST] C [/INST]⟦ Ünï ✓ </s>⟧",
}


@pytest.mark.parametrize("template", GOLDEN, ids=["chatml", "llama3", "gemma", "mistral", "llama2"])
def test_learns_only_answers_and_stop_tokens_with_each_template(template: str) -> None:
    tokenizer = make_tokenizer(template, SPECIAL[template])
    row = chat("A", "B", "C", "Ünï ✓")
    example = encode_one(row, tokenizer)
    assert mark_learned(example, tokenizer) == GOLDEN[template]
    assert example.labels[-1] == example.input_ids[-1] == tokenizer.eos_token_id
    prompt = prompt_ids(row.prompt, tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
    assert prompt == tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(
    "texts",
    [
        ("hi", "hi"),
        ("hi", "<|im"),
        ("hi", "im_end"),
        ("hi", "assistant"),
        ("a\n\nb", "\n\nx\n"),
        ("x", "y " * 50, "z", "w"),
        ("e", "e\u0301\U0001f469\u200d\U0001f680"),
        ("tell", "use <|im_end|> to stop"),
    ],
)
def test_learned_text_equals_answers_and_stop_tokens(texts: tuple[str, ...]) -> None:
    tokenizer = tiny.tokenizer()
    example = encode_one(chat(*texts, system="Be brief."), tokenizer)
    assert learned_text(example, tokenizer) == "".join(f"{answer}<|im_end|>" for answer in texts[1::2])


def test_learns_only_the_completion_of_a_pair() -> None:
    tokenizer = tiny.tokenizer()
    rows = [Row(pair["id"], chat(pair["prompt"], pair["completion"]).messages, "t:1") for pair in tiny.sums(20)]
    examples = encode(rows, tokenizer, {2}, Rules(4096, "drop")).examples
    assert [learned_text(example, tokenizer) for example in examples] == [row.answer + "<|im_end|>" for row in rows]
    assert [example.supervised for example in examples] == [len(row.answer) + 1 for row in rows]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("emits", [True, False])
def test_adds_bos_as_often_as_the_template_does(emits: bool, adds: bool) -> None:
    template = ("{{ bos_token }}" if emits else "") + tiny.CHATML
    tokenizer = make_tokenizer(template, ("<s>", "<|im_end|>", "<|im_start|>"), adds_bos=adds)
    assert (tokenizer("x")["input_ids"][0] == 0) == adds
    row = chat("hi", "ho")
    expected = tokenizer.apply_chat_template(list(row.messages))["input_ids"]
    for ids in (encode_one(row, tokenizer).input_ids, prompt_ids(row.prompt, tokenizer)):
        assert ids.count(0) == expected.count(0) == int(emits)
        assert (ids[0] == 0) == emits


@pytest.mark.parametrize("adds", [True, False])
def test_encodes_prompt_completion_end_without_a_template(adds: bool) -> None:
    tokenizer = make_tokenizer(None, adds_bos=adds)
    example = encode_one(chat("2+2=", " 4"), tokenizer)
    assert mark_learned(example, tokenizer) == ("<s>" if adds else "") + "2+2=⟦ 4</s>⟧"
    assert prompt_ids(chat("2+2=", "4").prompt, tokenizer) == example.input_ids[: 4 + adds]
    assert encode_one(chat("<s>2+2=", "4"), tokenizer).input_ids.count(0) == 1
    with pytest.raises(RecipeError, match=r"t\.jsonl:1: the tokenizer has no chat template"):
        encode_one(chat("a", "b", "c", "d"), tokenizer)
    with pytest.raises(RecipeError, match="no chat template"):
        prompt_ids(chat("a", "b", system="s").prompt, tokenizer)


@pytest.mark.parametrize("template", [None, tiny.CHATML])
def test_refuses_a_stop_token_at_which_the_model_does_not_stop(template: str) -> None:
    tokenizer = make_tokenizer(template, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    ends, stops = ("<|im_end|>", "</s>") if template else ("</s>", "<|im_end|>")
    with pytest.raises(RecipeError, match="the tuned model would not stop") as caught:
        encode_one(chat("hi", "ho"), tokenizer, {tokenizer.convert_tokens_to_ids(stops)})
    assert repr(ends) in str(caught.value)
    assert repr(stops) in str(caught.value)
    with pytest.raises(RecipeError, match="names no token that stops"):
        encode([chat("hi", "ho")], tokenizer, set(), Rules(10, "drop"))
    both = {1, 3}
    assert encode_one(chat("hi", "ho"), tokenizer, both).labels[-1] == (3 if template else 1)


def test_refuses_a_stop_token_that_merges_into_another() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}", merges=(("o", "!"),))
    stop = {tokenizer.convert_tokens_to_ids("!")}
    assert encode_one(chat("hi", "ha"), tokenizer, stop).supervised == 3
    with pytest.raises(
        RecipeError, match=r"t\.jsonl:1: the tokenizer reads the stop token at the end of the text as 'o!'"
    ):
        encode_one(chat("hi", "ho"), tokenizer, stop)


def test_learns_an_answer_as_the_template_strips_it() -> None:
    tokenizer = make_tokenizer(LLAMA3, SPECIAL[LLAMA3])
    assert learned_text(encode_one(chat("A", "  B\n", "C", " D "), tokenizer), tokenizer) == "B<|eot_id|>D<|eot_id|>"


def test_refuses_a_template_that_ends_an_answer_with_nothing() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(RecipeError, match="puts nothing after an answer, but the model stops at '</s>'"):
        encode_one(chat("hi", "ho"), tokenizer)


def test_an_earlier_answer_that_the_template_rewrites_becomes_an_example() -> None:
    tokenizer = make_tokenizer(THINKING, SPECIAL[THINKING])
    row = chat("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")
    encoded = encode([row], tokenizer, {1}, Rules(4096))
    first, last = encoded.examples
    assert (first.id, last.id) == ("r#1", "r#2")
    assert learned_text(first, tokenizer) == "<think>\nx\n</think>\n\nb<|im_end|>"
    assert learned_text(last, tokenizer) == "<think>\ny\n</think>\n\nd<|im_end|>"
    assert (encoded.partly_learned, encoded.split_rows, encoded.split_examples) == ([], ["r"], 2)
    assert encoded.split_tokens == len(first.input_ids)
    (note,) = encoded.notes()
    assert note.startswith("1 conversations become 2 examples, since the template drops or rewrites earlier turns: 1.")
    for example, turns in ((first, 1), (last, 3)):
        prompt = prompt_ids([*row.messages[:turns]], tokenizer)
        assert example.input_ids[: example.prompt_size] == prompt
    alone = encode([row], tokenizer, {1}, Rules(4096, learn="last_answer"))
    assert [example.input_ids for example in alone.examples] == [last.input_ids]


@pytest.mark.parametrize("texts", [("a", "b"), ("a", "think"), ("a", "b", "c", "d")])
def test_an_empty_thinking_block_of_the_template_is_context(texts: tuple[str, ...]) -> None:
    tokenizer = make_tokenizer(THINKING, SPECIAL[THINKING])
    row, block = chat(*texts), "<think>\n\n</think>\n\n"
    encoded = encode([row], tokenizer, {1}, Rules(4096))
    (example,) = encoded.examples
    assert learned_text(example, tokenizer) == "".join(f"{answer}<|im_end|>" for answer in texts[1::2])
    assert (encoded.template_adds, encoded.thinking_block, encoded.with_block) == ("", block, 1)
    assert repr(block) in encoded.notes()[0]
    assert encoded.served_block == block
    reasoned = chat(*texts[:-1], f"<think>\nhm\n</think>\n\n{texts[-1]}")
    assert encode([row, reasoned], tokenizer, {1}, Rules(4096)).served_block == ""
    prompt = tokenizer.decode(example.input_ids[: example.prompt_size])
    assert prompt.endswith("<|im_start|>assistant\n" + block)
    assert prompt_ids(row.prompt, tokenizer, block=block) == example.input_ids[: example.prompt_size]


def test_refuses_a_last_turn_that_the_template_rewrites() -> None:
    opened = tiny.CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    with pytest.raises(
        RecipeError, match=r"t\.jsonl:1: the chat template changes the text before an answer: .*<think>"
    ):
        encode_one(chat("a", "b"), tiny.tokenizer(opened))
    upper = tiny.CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(
        RecipeError, match=r"t\.jsonl:1: the chat template changes the answer: the rendered text does not contain 'ho'"
    ):
        encode_one(chat("hi", "ho"), tiny.tokenizer(upper))


def test_names_the_row_that_the_template_rejects() -> None:
    with pytest.raises(RecipeError, match=r"t\.jsonl:1: the chat template rejects .*System role not supported"):
        encode_one(chat("hi", "ho", system="s"), make_tokenizer(GEMMA, SPECIAL[GEMMA]))


def test_names_the_row_on_which_the_tokenizer_fails() -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "hi": 2, "ho": 3, "a": 4}, unk_token="<none>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    rows = [Row("a", chat("hi", " ho").messages, "t.jsonl:1"), Row("b", chat("what", " ho").messages, "t.jsonl:2")]
    with pytest.raises(RecipeError, match=r"t\.jsonl:2: the tokenizer fails on this row: Exception: WordLevel error"):
        encode(rows, tokenizer, {1}, Rules(64, "drop"))


def test_splits_a_token_that_spans_prompt_and_answer() -> None:
    newline, space, h = "Ċ", "Ġ", "h"
    tokenizer = make_tokenizer(tiny.CHATML, SPECIAL[tiny.CHATML], merges=((newline, newline), (space, h)))
    row = chat("hi", "\nho")
    whole = tokenizer.apply_chat_template(list(row.messages))["input_ids"]
    prompt = prompt_ids(row.prompt, tokenizer)
    assert whole[: len(prompt)] != prompt  # the two line breaks are one token there
    example = encode_one(row, tokenizer)
    assert example.input_ids[: len(prompt)] == prompt
    assert learned_text(example, tokenizer) == "\nho<|im_end|>"
    twice = encode([chat("hi", "\nho", "and", "so")], tokenizer, {1}, Rules(4096, "drop"))
    # In the longer text, generation would see the joined token before the first answer.
    assert [learned_text(each, tokenizer) for each in twice.examples] == ["\nho<|im_end|>", "so<|im_end|>"]
    assert twice.examples[0].input_ids == example.input_ids
    assert twice.partly_learned == []
    plain = make_tokenizer(None, merges=((space, h),))
    assert mark_learned(encode_one(chat("say ", "hi"), plain), plain) == "say ⟦hi</s>⟧"


def test_splits_prompt_and_answer_with_a_tokenizer_that_adds_a_space() -> None:
    vocabulary = {
        name: index for index, name in enumerate(["<s>", "</s>", "<0x0A>", "▁", *"abcdefghijk:y", "▁y", "\n"])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "y")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    row = chat("a: ", "yea")
    prompt, example = prompt_ids(row.prompt, tokenizer), encode_one(row, tokenizer)
    assert tokenizer("a: yea")["input_ids"][: len(prompt)] != prompt
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.input_ids) == "a: yea</s>"


def rows_of_length(sizes: list[int]) -> list[Row]:
    """Rows whose prompts have these sizes in characters, which are tokens."""
    return [Row(f"row-{size}", chat("p" * size, "answer").messages, f"t.jsonl:{size}") for size in sizes]


def test_drops_and_counts_long_rows_and_cuts_no_answer() -> None:
    tokenizer = tiny.tokenizer()
    rows = rows_of_length([5, 100, 6, 200, 7, 300, 8, 400, 9, 10])
    encoded = encode(rows, tokenizer, {2}, Rules(64, "drop"))
    assert encoded.dropped == ["row-100", "row-200", "row-300", "row-400"]
    assert encoded.dropped_lengths == [126, 226, 326, 426]
    assert len(encoded.examples) == 6
    for example in encoded.examples:
        assert example.input_ids[-1] == example.labels[-1] == 2
        assert learned_text(example, tokenizer) == "answer<|im_end|>"


def test_keeps_a_row_of_exactly_max_length() -> None:
    (size,) = encode(rows_of_length([5]), tiny.tokenizer(), {2}, Rules(1, "drop")).dropped_lengths
    assert len(encode(rows_of_length([5]), tiny.tokenizer(), {2}, Rules(size, "drop")).examples) == 1
    assert len(encode(rows_of_length([5]), tiny.tokenizer(), {2}, Rules(size - 1, "drop")).examples) == 0


def test_refuses_a_long_row_with_overlength_error() -> None:
    with pytest.raises(RecipeError, match=r"t\.jsonl:100: row row-100 has 126 tokens, more than data\.max_length 64"):
        encode(rows_of_length([5, 100, 200]), tiny.tokenizer(), {2}, Rules(64, "error"))


def test_truncate_prompt_keeps_bos_and_the_answer() -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + tiny.CHATML, ("<s>", "<|im_end|>", "<|im_start|>"))
    rows = [chat("p" * 100, "answer"), Row("long", chat("p", "a" * 70).messages, "t.jsonl:2"), chat("q", "fits")]
    encoded = encode(rows, tokenizer, {1}, Rules(64, "truncate_prompt"))
    cut, fits = encoded.examples
    assert (encoded.truncated, encoded.dropped) == (["r"], ["long"])
    assert len(cut.input_ids) == 64
    assert cut.input_ids[0] == 0
    assert mark_learned(cut, tokenizer) == "<s>" + "p" * 43 + "<|im_end|>\n<|im_start|>assistant\n⟦answer<|im_end|>⟧"
    assert learned_text(fits, tokenizer) == "fits<|im_end|>"
    first = chat("p" * 60, "early", "q", "late")
    assert encode([first], tokenizer, {1}, Rules(64, "truncate_prompt")).examples[0].supervised == 6 + 5
    assert encode([first], tokenizer, {1}, Rules(32, "truncate_prompt")).dropped == [
        "r"
    ]  # it would cut the first answer


def test_keeps_a_row_of_1500_tokens_whole() -> None:
    tokenizer = tiny.tokenizer()
    (example,) = encode(rows_of_length([1500 - 26]), tokenizer, {2}, Rules(2048, "drop")).examples
    batch = Collator(0)([vars(example)])
    assert batch["input_ids"].shape == (1, 1500)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: tiny models are slower where threads compete for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_model_trained_with_pad_equal_to_stop_stops() -> None:
    tokenizer = tiny.tokenizer()
    rows = [chat(prompt, answer) for prompt, answer in (("a", "one"), ("b", "two!"), ("c", "three"), ("d", "4"))]
    examples = encode(rows, tokenizer, {2}, Rules(128, "drop")).examples
    batch = Collator(pad_id=2)([vars(example) for example in examples])
    model = tiny.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        loss: Any = model(**batch).loss
        loss.backward()
        optimizer.step()
    model.eval()
    for row in rows:
        prompt = torch.tensor([prompt_ids(row.prompt, tokenizer)])
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=18,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )
        assert tokenizer.decode(generated[0, prompt.shape[1] :]) == row.answer + "<|im_end|>"
