"""Texts of megabytes: their length is bounded before they are tokenized, and what is kept of them is the same."""

import json
import random
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from llmtune.data.encoding import lengths, plain
from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.row import Row
from llmtune.errors import RecipeError
from tests.data.test_conversation import make_tokenizer
from tests.data.test_encode import chat
from tests.data.test_encode import make_tokenizer as make_bytes
from tests.data.test_gate import notes_of, run_gate
from tests.support import tiny
from tests.support.templates import LLAMA3, MISTRAL, TEMPLATES

MEGABYTE = 1 << 20


def write(folder: Path, prompt: str, completion: str) -> list[dict[str, str]]:
    """Three short rows and a long one."""
    return [*tiny.sums(3), {"id": "long", "prompt": prompt, "completion": completion}]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("word " * (2 * MEGABYTE), "x"),
        ("x" * (10 * MEGABYTE), "x"),
        ("q", "answer " * MEGABYTE),
        ("q", "<|im_end|>" * MEGABYTE),
        (" " * (10 * MEGABYTE) + "q", "x"),
    ],
    ids=["prompt", "one word", "answer", "stop tokens", "spaces"],
)
@pytest.mark.parametrize("overlength", ["drop", "truncate_prompt"])
@pytest.mark.slow
def test_a_row_of_ten_megabytes_takes_no_time(tmp_path: Path, prompt: str, completion: str, overlength: str) -> None:
    began = time.process_time()
    checked = run_gate(
        tmp_path, {"train": write(tmp_path, prompt, completion), "eval": tiny.sums(2, 9)}, overlength=overlength
    )
    assert time.process_time() - began < 10
    over = checked.findings["over_length"]["train"]
    assert (over["rows"], over["ids"], over["of"]) == (1, ["long"], 4)
    is_cut = overlength == "truncate_prompt" and completion == "x"
    assert over["cut"] == is_cut
    assert len(checked.train) == 3 + is_cut
    assert "1 of 4 train rows are longer than max_length (long)" in notes_of(checked)
    if is_cut:
        assert [len(example.input_ids) for example in checked.train][-1] == 1024


def test_says_what_such_a_row_has_at_least(tmp_path: Path) -> None:
    rows = write(tmp_path, "x" * MEGABYTE, "x")
    words = (
        r"train\.jsonl:4: row long has at least \d+ tokens, more than data\.max_length 1024; try more than \d+, or over"
    )
    with pytest.raises(RecipeError, match=words):
        run_gate(tmp_path, {"train": rows, "eval": tiny.sums(2, 9)}, overlength="error")
    with pytest.raises(RecipeError, match=r"all 1 train rows are longer .*\(the shortest has at least \d+ tokens\)"):
        run_gate(tmp_path, {"train": rows[3:], "eval": tiny.sums(2, 9)})


def rows_of_every_length(draw: random.Random) -> list[Row]:
    """Conversations whose prompts and answers are short or long, of words, digits, lines and one long word."""
    words = [
        "hello ",
        "a\n",
        "\n\n",
        "   ",
        "12",
        "é\u0301",
        "\U0001f469\u200d\U0001f680",
        "x",
        "assistant",
        "the end. ",
    ]

    def text(most: int) -> str:
        return "".join(draw.choice(words) for _ in range(draw.choice([1, 3, most]))).strip() or "x"

    rows = [chat(*(text(400) for _ in range(2 * draw.randint(1, 3)))) for _ in range(30)]
    rows += [chat(text(3000), text(5)) for _ in range(30)]
    return [Row(str(index), row.messages, f"t:{index}") for index, row in enumerate(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trimmed", "one word", "metaspace", "bytes"])
@pytest.mark.parametrize("template", [tiny.CHATML, LLAMA3, MISTRAL, TEMPLATES["no special tokens"], None])
@pytest.mark.parametrize("overlength", ["drop", "truncate_prompt"])
def test_a_bounded_text_gives_the_same_examples(
    monkeypatch: pytest.MonkeyPatch, template: str | None, kind: str, overlength: str
) -> None:
    tokenizer = make_tokenizer(kind, template or MISTRAL)
    tokenizer.chat_template = template
    rows = [row for row in rows_of_every_length(random.Random(kind)) if template or len(row.messages) == 2]
    stop = {tokenizer.eos_token_id}
    exact = encode(rows, tokenizer, stop, Rules(128, overlength))
    monkeypatch.setattr(lengths, "_CHARACTERS", 100)
    monkeypatch.setattr(lengths, "_CHARACTERS_PER_TOKEN", 1)
    bounded = encode(rows, tokenizer, stop, Rules(128, overlength))
    assert len(bounded.bounded) > 5 or overlength == "truncate_prompt"
    examples = {example.id: example for example in exact.examples}
    assert all(examples[example.id] == example for example in bounded.examples)
    lost = set(examples) - {example.id for example in bounded.examples}
    assert row_ids(bounded.dropped) == row_ids(exact.dropped) | row_ids(lost)
    # The tokens at the start of an answer hang on its prompt here: where an answer can be cut, its row is left out.
    assert not lost or (template == LLAMA3 and overlength == "truncate_prompt" and len(row_ids(lost)) < 10)
    lengths_of = dict(zip(exact.dropped, exact.dropped_lengths, strict=True))
    for name, least in zip(bounded.dropped, bounded.dropped_lengths, strict=True):
        assert name in lost or name not in lengths_of or least <= lengths_of[name]


def row_ids(names: Iterable[str]) -> set[str]:
    """The ids of the rows of examples."""
    return {name.partition("#")[0] for name in names}


def test_a_text_that_cannot_be_cut_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer("one word", TEMPLATES["no special tokens"])
    row = chat("x" * 200_001, "x")
    encoded = encode([row], tokenizer, {tokenizer.eos_token_id}, Rules(64, "truncate_prompt"))
    assert len(encoded.examples) + len(encoded.dropped) == 1
    assert json.dumps(encoded.dropped_lengths)


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
@pytest.mark.parametrize("learn", ["answers", "last_answer", "all"])
def test_a_long_conversation_is_cut_at_a_turn(cut: int, learn: str) -> None:
    tokenizer = tiny.tokenizer()
    texts = [text for turn in range(8) for text in (f"question {turn}", f"answer {turn}")]
    (kept,) = encode([chat(*texts[: 2 * cut])], tokenizer, {2}, Rules(4096, learn=learn)).examples
    size = len(kept.input_ids)
    rules = Rules(size + 3, "truncate_turns", learn=learn)
    encoded = encode([chat(*texts), chat(*texts[:2])], tokenizer, {2}, rules)
    assert encoded.examples[0].input_ids == kept.input_ids
    assert encoded.examples[0].labels == kept.labels
    assert (encoded.cut_at_turn, encoded.dropped) == (["r"], [])
    assert encoded.notes() == ["1 conversations are cut at a turn, to fit into max_length"]
    too_short = encode([chat(*texts)], tokenizer, {2}, replace(rules, max_length=10))
    assert (too_short.examples, too_short.dropped, too_short.cut_at_turn) == ([], ["r"], [])
    huge = chat(*texts[: 2 * cut], "x " * MEGABYTE, "a")
    assert encode([huge], tokenizer, {2}, rules).examples[0].input_ids == kept.input_ids


def text_rows(*texts: str) -> list[Row]:
    """Rows of plain text."""
    return [Row(f"d{index}", (), f"t.txt:{index + 1}", text=text) for index, text in enumerate(texts)]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_texts_are_joined_and_cut_and_learned_throughout(adds_bos: bool) -> None:
    tokenizer = make_bytes(None, adds_bos=adds_bos)
    texts = ["one two", "x" * 50, "", "the end"]
    encoded = encode(text_rows(*texts), tokenizer, {1}, Rules(16))
    ids = [token for example in encoded.examples for token in example.input_ids]
    bos = tokenizer.bos_token if adds_bos else ""
    assert tokenizer.decode(ids) == "".join(f"{bos}{text}{tokenizer.eos_token}" for text in texts)
    assert [len(example.input_ids) for example in encoded.examples[:-1]] == [16] * (len(ids) // 16)
    assert all(example.labels == example.input_ids and example.is_text for example in encoded.examples)
    names = [example.id for example in encoded.examples]
    assert names[:2] == ["d0#1", "d1#2"]
    assert len({*names}) == len(names)
    first, second, third, other = text_rows("one ", "two ", "three", "four")
    first, second = replace(first, goes_on=True), replace(second, goes_on=True, continues=first.where)
    third = replace(third, continues=second.where)
    decoded = [
        tokenizer.decode(example.input_ids)
        for rows in ([first, second, third, other], [first, third, other])
        for example in encode(rows, tokenizer, {1}, Rules(99)).examples
    ]
    rest = f"{tokenizer.eos_token}{bos}four{tokenizer.eos_token}"
    assert decoded == [f"{bos}one two three{rest}", f"{bos}one ", f"three{rest}"], "a cut is no end of a document"
    mixed = encode([chat("hi", "ho"), *text_rows("a"), chat("hi", "ho")], tiny.tokenizer(), {2}, Rules(64))
    assert [example.is_text for example in mixed.examples] == [False, True, False]


@pytest.mark.parametrize("kind", ["trimmed", "metaspace"])
def test_a_text_of_one_huge_line_keeps_its_tokens(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(plain, "_SLICE", 1000)
    tokenizer = make_tokenizer(kind, MISTRAL)
    words = ["hello ", "a\n", "   ", "12", "é\u0301", "the end. ", "\n\n"]
    text = "".join(random.Random(0).choices(words, k=3000))
    examples = encode(text_rows(text), tokenizer, {1}, Rules(512)).examples
    ids = [token for example in examples for token in example.labels]
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[:-1] == expected


def test_a_text_of_one_huge_word_takes_bounded_time() -> None:
    began = time.process_time()
    examples = encode(text_rows("x" * MEGABYTE), make_tokenizer("one word", MISTRAL), {1}, Rules(1024)).examples
    assert time.process_time() - began < 5
    assert len(examples) > 20
