"""Long conversations: the quick way to encode them gives what the slow and plain way gives, and time grows linearly."""

import random
import re
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmtune.data.encoding.encode import encode
from llmtune.data.encoding.rules import Rules
from llmtune.data.encoding.template import Renderer, Request
from llmtune.data.row import Row
from llmtune.errors import RecipeError
from tests.support import tiny
from tests.support.templates import TEMPLATES, find_answers, label_slowly, special_tokens

TEXTS = [
    "hi",
    "ok",
    "Hello there, friend.",
    "a\n\nb",
    " leading",
    "trailing \n",
    "\n\nx\n",
    "1 2 3",
    "é\u0301\U0001f469\u200d\U0001f680",
    "assistant",
    "user\nhi",
    "im_end|>",
    "def f(x):\n    return x",
    "   three",
    "x" * 40,
    "\tq",
    "the end. ",
]
THOUGHTS = ["<think>\nhm\n</think>\n\nyes", "<think>\n\n</think>\n\nno"]


def make_tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one kind with the special tokens of a template, BOS first, then the end of a turn."""
    special = list(special_tokens(template))
    backend: Any = Tokenizer(models.BPE(unk_token=None, byte_fallback=kind == "metaspace"))
    size = 0 if kind == "bytes" else 500
    corpus = [
        " ".join(TEXTS) * 3,
        *[f"<|{role}|> {role}:\n\n{text} [INST] [/INST]" for role in ("user", "assistant") for text in TEXTS],
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
        alphabet = sorted(set("".join(corpus) + "".join(TEMPLATES.values())))
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "one word")
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=kind == "trimmed")
    backend.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet), show_progress=False)
    )
    backend.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    fast.chat_template = template
    return fast


def talk(draw: random.Random, answers: int, thoughts: bool = False) -> Row:
    """A conversation of random texts."""
    messages = [{"role": "system", "content": draw.choice(["Be brief.", ""])}] if draw.random() < 0.4 else []
    for turn in range(answers):
        answer = draw.choice(THOUGHTS) if thoughts and draw.random() < 0.2 else draw.choice(TEXTS)
        messages += [
            {"role": "user", "content": draw.choice(TEXTS) + str(turn) * draw.randint(0, 1)},
            {"role": "assistant", "content": answer},
        ]
    return Row("r", tuple(messages), "t.jsonl:1")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trimmed", "untrimmed", "one word", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_encodes_as_the_slow_way_does(name: str, kind: str) -> None:
    tokenizer = make_tokenizer(kind, TEMPLATES[name])
    stop = {tokenizer.eos_token_id}
    draw = random.Random(f"{name}{kind}")
    compared, refused = 0, []
    for answers in (1, 2, 3, 8, 9, 12, 20, 30):
        for thoughts in (False, True):
            row = talk(draw, answers, thoughts)
            try:
                examples = encode([row], tokenizer, stop, Rules(100_000, "drop")).examples
            except RecipeError as error:
                refused.append((row, str(error)))
                continue
            labels = [example.labels for example in examples]
            assert labels == label_slowly(row, examples, tokenizer, stop), f"{answers} answers"
            compared += 1
    for row, words in refused:
        if "the tokenizer joins" not in words:
            with pytest.raises(RecipeError, match=re.escape(words)):
                find_answers(tokenizer, stop).last(row)
    assert compared >= 4 or name == "names the length"


def test_learns_an_answer_that_the_template_takes_apart_and_writes_as_it_was() -> None:
    tokenizer = make_tokenizer("bytes", TEMPLATES["thoughts kept"])
    answers = ["yes"] * 12
    answers[4] = "<think>\n\n</think>\n\nno"
    turns = [({"role": "user", "content": "q"}, {"role": "assistant", "content": answer}) for answer in answers]
    row = Row("r", tuple(message for turn in turns for message in turn), "t.jsonl:1")
    encoded = encode([row], tokenizer, {tokenizer.eos_token_id}, Rules(100_000, "drop"))
    (example,) = encoded.examples
    assert [example.labels] == label_slowly(row, [example], tokenizer, {tokenizer.eos_token_id})
    assert encoded.partly_learned == []


def test_the_quick_way_is_taken_where_the_template_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    renders: list[int] = []
    apply = Renderer._apply

    def counted(renderer: Renderer, request: Request) -> str:
        renders.append(len(request.messages))
        return apply(renderer, request)

    monkeypatch.setattr(Renderer, "_apply", counted)
    for name in ("chatml", "llama3", "gemma", "mistral", "llama2", "system in the first question", "default system"):
        renders.clear()
        tokenizer = make_tokenizer("bytes", TEMPLATES[name])
        row = Row("r", talk(random.Random(0), 200).messages[-400:], "t:1")
        (example,) = encode([row], tokenizer, {tokenizer.eos_token_id}, Rules(100_000, "drop")).examples
        assert len(renders) <= 15, name
        assert example.labels.count(tokenizer.eos_token_id) > 190, name


@pytest.mark.parametrize("name", ["chatml", "qwen3", "no special tokens"])
@pytest.mark.slow
def test_time_grows_with_the_length_alone(name: str) -> None:
    tokenizer = make_tokenizer("trimmed", TEMPLATES[name])
    row = talk(random.Random(1), 2000)
    began = time.process_time()
    encoded = encode([row], tokenizer, {tokenizer.eos_token_id}, Rules(1_000_000, "drop"))
    assert time.process_time() - began < 10
    assert len(encoded.examples) == 1


def test_a_template_that_fails_is_an_error_of_the_row() -> None:
    tokenizer = tiny.tokenizer("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}")
    row = Row("r", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "t.jsonl:7")
    with pytest.raises(RecipeError, match=r"t\.jsonl:7: the chat template fails on this conversation: TypeError"):
        encode([row], tokenizer, {2}, Rules(64, "drop"))
