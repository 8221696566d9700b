"""Exactly the assistant's words and the stop token are learned, behind the very ids that generation starts from."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmtune.data.collate import Collator
from llmtune.data.encode import IGNORED, Example, encode, prompt_ids
from llmtune.data.findings import marked
from llmtune.data.rows import Row
from llmtune.errors import RecipeError
from tests.support import tiny

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{% if role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# As Qwen3: thoughts of turns before the last question are left out, and the last answer gets a think block in any case.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = {
    tiny.CHATML: ("<|im_start|>", "<|im_end|>"),
    THINKING: ("<|im_start|>", "<|im_end|>"),
    LLAMA3: ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    GEMMA: ("<bos>", "<end_of_turn>", "<start_of_turn>"),
    MISTRAL: ("<s>", "</s>"),
    LLAMA2: ("<s>", "</s>"),
}


def make(
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
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    first = [{"role": "system", "content": system}] if system is not None else []
    return Row("r", (*first, *turns), "t.jsonl:1")


def one(row: Row, tokenizer: PreTrainedTokenizerFast, stop: set[int] | None = None) -> Example:
    (example,) = encode([row], tokenizer, stop or {tokenizer.eos_token_id}, 4096, "drop").examples
    return example


def learned(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
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
def test_each_template_learns_the_answers_and_their_stop_tokens_only(template):
    tokenizer = make(template, SPECIAL[template])
    row = chat("A", "B", "C", "Ünï ✓")
    example = one(row, tokenizer)
    assert marked(example, tokenizer) == GOLDEN[template]
    assert example.labels[-1] == example.input_ids[-1] == tokenizer.eos_token_id
    asked = prompt_ids(row.prompt, tokenizer)
    assert example.input_ids[: len(asked)] == asked
    assert asked == tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True)["input_ids"]


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
def test_the_learned_text_is_the_answers_and_stop_tokens_exactly(texts):
    tokenizer = tiny.tokenizer()
    example = one(chat(*texts, system="Be brief."), tokenizer)
    assert learned(example, tokenizer) == "".join(f"{answer}<|im_end|>" for answer in texts[1::2])


def test_what_a_prompt_and_completion_row_learns_is_the_completion():
    tokenizer = tiny.tokenizer()
    rows = [Row(pair["id"], chat(pair["prompt"], pair["completion"]).messages, "t:1") for pair in tiny.sums(20)]
    found = encode(rows, tokenizer, {2}, 4096, "drop").examples
    assert [learned(example, tokenizer) for example in found] == [row.answer + "<|im_end|>" for row in rows]
    assert [example.supervised for example in found] == [len(row.answer) + 1 for row in rows]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("emits", [True, False])
def test_bos_is_there_as_often_as_the_model_expects_it(emits, adds):
    template = ("{{ bos_token }}" if emits else "") + tiny.CHATML
    tokenizer = make(template, ("<s>", "<|im_end|>", "<|im_start|>"), adds_bos=adds)
    assert (tokenizer("x")["input_ids"][0] == 0) == adds
    row = chat("hi", "ho")
    expected = tokenizer.apply_chat_template(list(row.messages))["input_ids"]
    for ids in (one(row, tokenizer).input_ids, prompt_ids(row.prompt, tokenizer)):
        assert ids.count(0) == expected.count(0) == int(emits)
        assert (ids[0] == 0) == emits


@pytest.mark.parametrize("adds", [True, False])
def test_without_a_template_a_row_is_prompt_completion_end(adds):
    tokenizer = make(None, adds_bos=adds)
    example = one(chat("2+2=", " 4"), tokenizer)
    assert marked(example, tokenizer) == ("<s>" if adds else "") + "2+2=⟦ 4</s>⟧"
    assert prompt_ids(chat("2+2=", "4").prompt, tokenizer) == example.input_ids[: 4 + adds]
    assert one(chat("<s>2+2=", "4"), tokenizer).input_ids.count(0) == 1
    with pytest.raises(RecipeError, match=r"t\.jsonl:1: the tokenizer has no chat template"):
        one(chat("a", "b", "c", "d"), tokenizer)
    with pytest.raises(RecipeError, match="no chat template"):
        prompt_ids(chat("a", "b", system="s").prompt, tokenizer)


@pytest.mark.parametrize("template", [None, tiny.CHATML])
def test_a_stop_token_that_the_model_does_not_stop_at_is_refused(template):
    tokenizer = make(template, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    ends, stops = ("<|im_end|>", "</s>") if template else ("</s>", "<|im_end|>")
    with pytest.raises(RecipeError, match="it would never learn to stop") as caught:
        one(chat("hi", "ho"), tokenizer, {tokenizer.convert_tokens_to_ids(stops)})
    assert repr(ends) in str(caught.value)
    assert repr(stops) in str(caught.value)
    with pytest.raises(RecipeError, match="names no token that stops"):
        encode([chat("hi", "ho")], tokenizer, set(), 10, "drop")
    both = {1, 3}
    assert one(chat("hi", "ho"), tokenizer, both).labels[-1] == (3 if template else 1)


def test_a_stop_token_that_is_read_as_part_of_another_is_refused():
    tokenizer = make("{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}", merges=(("o", "!"),))
    stop = {tokenizer.convert_tokens_to_ids("!")}
    assert one(chat("hi", "ha"), tokenizer, stop).supervised == 3
    with pytest.raises(RecipeError, match=r"t\.jsonl:1: the stop token in the chat template's text is read as 'o!'"):
        one(chat("hi", "ho"), tokenizer, stop)


def test_an_answer_that_the_template_strips_is_learned_as_it_shows_it():
    tokenizer = make(LLAMA3, SPECIAL[LLAMA3])
    assert learned(one(chat("A", "  B\n", "C", " D "), tokenizer), tokenizer) == "B<|eot_id|>D<|eot_id|>"


def test_a_template_that_ends_an_answer_with_nothing_is_refused():
    tokenizer = make("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(RecipeError, match="puts nothing after an answer, but the model stops at '</s>'"):
        one(chat("hi", "ho"), tokenizer)


def test_an_earlier_turn_that_the_template_rewrites_is_not_learned_and_counted():
    tokenizer = make(THINKING, SPECIAL[THINKING])
    rows = [chat("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd"), chat("a", "b")]
    found = encode([rows[0]], tokenizer, {1}, 4096, "drop")
    assert learned(found.examples[0], tokenizer) == "<think>\ny\n</think>\n\nd<|im_end|>"
    assert found.partly_learned == ["r"]
    asked = prompt_ids(rows[0].prompt, tokenizer)
    assert found.examples[0].input_ids[: len(asked)] == asked
    short = encode([rows[1]], tokenizer, {1}, 4096, "drop")
    assert (short.partly_learned, short.template_adds) == ([], "<think>\n\n</think>")
    assert learned(short.examples[0], tokenizer) == "<think>\n\n</think>\n\nb<|im_end|>"  # what generation must say
    same = one(chat("a", "think"), tokenizer)
    assert learned(same, tokenizer) == "<think>\n\n</think>\n\nthink<|im_end|>"


def test_a_last_turn_that_the_template_rewrites_is_an_error():
    opened = tiny.CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    with pytest.raises(RecipeError, match=r"t\.jsonl:1: the chat template rewrites earlier turns: it asks .*<think>"):
        one(chat("a", "b"), tiny.tokenizer(opened))
    upper = tiny.CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(RecipeError, match=r"t\.jsonl:1: the chat template rewrites the answer: 'ho' does not stand"):
        one(chat("hi", "ho"), tiny.tokenizer(upper))


def test_a_conversation_that_the_template_refuses_is_named():
    with pytest.raises(RecipeError, match=r"t\.jsonl:1: the chat template refuses .*System role not supported"):
        one(chat("hi", "ho", system="s"), make(GEMMA, SPECIAL[GEMMA]))


def test_a_token_across_the_border_is_split_so_that_generation_starts_where_training_did():
    newline, space, h = "Ċ", "Ġ", "h"
    tokenizer = make(tiny.CHATML, SPECIAL[tiny.CHATML], merges=((newline, newline), (space, h)))
    row = chat("hi", "\nho")
    whole = tokenizer.apply_chat_template(list(row.messages))["input_ids"]
    asked = prompt_ids(row.prompt, tokenizer)
    assert whole[: len(asked)] != asked  # the two line breaks are one token there
    example = one(row, tokenizer)
    assert example.input_ids[: len(asked)] == asked
    assert learned(example, tokenizer) == "\nho<|im_end|>"
    twice = encode([chat("hi", "\nho", "and", "so")], tokenizer, {1}, 4096, "drop")
    assert learned(twice.examples[0], tokenizer) == "so<|im_end|>"  # generation would see the joined token before it
    assert twice.partly_learned == ["r"]
    plain = make(None, merges=((space, h),))
    assert marked(one(chat("say ", "hi"), plain), plain) == "say ⟦hi</s>⟧"


def test_a_tokenizer_that_starts_every_text_with_a_space_keeps_the_border_too():
    vocabulary = {
        name: index for index, name in enumerate(["<s>", "</s>", "<0x0A>", "▁", *"abcdefghijk:y", "▁y", "\n"])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "y")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    row = chat("a: ", "yea")
    asked, example = prompt_ids(row.prompt, tokenizer), one(row, tokenizer)
    assert tokenizer("a: yea")["input_ids"][: len(asked)] != asked
    assert example.input_ids[: len(asked)] == asked
    assert tokenizer.decode(example.input_ids) == "a: yea</s>"


def lengths(sizes: list[int]) -> list[Row]:
    return [Row(f"row-{size}", chat("p" * size, "answer").messages, f"t.jsonl:{size}") for size in sizes]


def test_over_long_rows_are_dropped_and_counted_and_no_answer_is_cut():
    tokenizer = tiny.tokenizer()
    rows = lengths([5, 100, 6, 200, 7, 300, 8, 400, 9, 10])
    found = encode(rows, tokenizer, {2}, 64, "drop")
    assert found.dropped == ["row-100", "row-200", "row-300", "row-400"]
    assert found.dropped_lengths == [126, 226, 326, 426]
    assert len(found.examples) == 6
    for example in found.examples:
        assert example.input_ids[-1] == example.labels[-1] == 2
        assert learned(example, tokenizer) == "answer<|im_end|>"


def test_the_limit_itself_is_not_over():
    (size,) = encode(lengths([5]), tiny.tokenizer(), {2}, 1, "drop").dropped_lengths
    assert len(encode(lengths([5]), tiny.tokenizer(), {2}, size, "drop").examples) == 1
    assert len(encode(lengths([5]), tiny.tokenizer(), {2}, size - 1, "drop").examples) == 0


def test_over_long_rows_can_be_an_error():
    with pytest.raises(RecipeError, match=r"t\.jsonl:100: row row-100 has 126 tokens, more than data\.max_length 64"):
        encode(lengths([5, 100, 200]), tiny.tokenizer(), {2}, 64, "error")


def test_the_start_of_a_prompt_can_be_cut_but_not_bos_or_the_answer():
    tokenizer = make("{{ bos_token }}" + tiny.CHATML, ("<s>", "<|im_end|>", "<|im_start|>"))
    rows = [chat("p" * 100, "answer"), Row("long", chat("p", "a" * 70).messages, "t.jsonl:2"), chat("q", "fits")]
    found = encode(rows, tokenizer, {1}, 64, "truncate_prompt")
    cut, fits = found.examples
    assert (found.truncated, found.dropped) == (["r"], ["long"])
    assert len(cut.input_ids) == 64
    assert cut.input_ids[0] == 0
    assert marked(cut, tokenizer) == "<s>" + "p" * 43 + "<|im_end|>\n<|im_start|>assistant\n⟦answer<|im_end|>⟧"
    assert learned(fits, tokenizer) == "fits<|im_end|>"
    first = chat("p" * 60, "early", "q", "late")
    assert encode([first], tokenizer, {1}, 64, "truncate_prompt").examples[0].supervised == 6 + 5
    assert encode([first], tokenizer, {1}, 32, "truncate_prompt").dropped == ["r"]  # it would cut the first answer


def test_a_row_reaches_the_collator_at_its_length():
    tokenizer = tiny.tokenizer()
    (example,) = encode(lengths([1500 - 26]), tokenizer, {2}, 2048, "drop").examples
    batch = Collator(0)([vars(example)])
    assert batch["input_ids"].shape == (1, 1500)


@pytest.fixture
def one_thread():
    """Tiny models are slower, not faster, where threads compete for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_model_taught_with_pad_equal_to_stop_stops():
    tokenizer = tiny.tokenizer()
    rows = [chat(prompt, answer) for prompt, answer in (("a", "one"), ("b", "two!"), ("c", "three"), ("d", "4"))]
    examples = encode(rows, tokenizer, {2}, 128, "drop").examples
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
        asked = torch.tensor([prompt_ids(row.prompt, tokenizer)])
        said = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=18,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )
        assert tokenizer.decode(said[0, asked.shape[1] :]) == row.answer + "<|im_end|>"
