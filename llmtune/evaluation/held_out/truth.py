"""The true answer to a held-out row, and the part of an answer that is compared: what follows a thought."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.example import IGNORED, Example
from llmtune.data.row import Row
from llmtune.evaluation.held_out.fields import Kind, canonical, parsed, refuse_constant

_THOUGHT_END = "</think>"


@dataclass(frozen=True)
class Truth:
    """What a model has to answer to one row."""

    text: str
    """The text that is learned, without its stop token."""
    final: str
    """The part of it that is compared: what follows the thought."""
    thought_end: str = ""
    """The text that ends a thought, "" where the row has none."""
    is_call: bool = False
    """Whether the answer calls tools."""

    @classmethod
    def of_text(cls, text: str) -> "Truth":
        """The true answer that a text is, where nothing else is known of its row."""
        end = _THOUGHT_END if _THOUGHT_END in text else ""
        return cls(text, text.rpartition(end)[2] if end else text, end)

    def compared(self, output: str) -> str:
        """The part of an answer that is compared with `final`."""
        return output.rpartition(self.thought_end)[2] if self.thought_end else output


class TruthReader:
    """Reads the true answers of encoded rows as a tokenizer decodes them."""

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, stop: set[int]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        added = tokenizer.added_tokens_decoder.items()
        special = {index: str(token) for index, token in added if token.special}
        self.keeps_special = any(
            token in special and token not in stop
            for example in examples
            for token in self._without_stop(example.input_ids[example.prompt_size :])
        )
        """Whether answers have special tokens, such as those around a tool call, beside their stop tokens."""
        self._special = list(special.values())

    def read(self, row: Row, example: Example) -> Truth:
        """Return the true answer of a row."""
        whole = self.text(example.input_ids[example.prompt_size :])
        pairs = zip(example.input_ids, example.labels, strict=True)
        text = self.text([token for token, label in pairs if label != IGNORED])
        end, final = _thought_end(row, whole, self._special)
        after = text.rpartition(end)[2] if end else text
        return Truth(text, final if text.endswith(final) else after, end, bool(row.messages[-1].get("tool_calls")))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer without its stop token; with special tokens where true answers have some."""
        kept = list(self._without_stop(ids))
        return str(self.tokenizer.decode(kept, skip_special_tokens=not self.keeps_special))

    def _without_stop(self, ids: Sequence[int]) -> Sequence[int]:
        return ids[:-1] if ids and ids[-1] in self.stop else ids


def kinds_of(truths: Sequence[Truth]) -> list[Kind]:
    """Say how each answer is compared: calls by their structure, others as JSON if every other one is JSON."""
    others = [truth for truth in truths if not truth.is_call]
    other: Kind = "JSON" if others and all(parsed(truth.final) is not None for truth in others) else "text"
    return ["tool calls" if truth.is_call else other for truth in truths]


def comparison(truths: Sequence[Truth]) -> str:
    """Say in words what exact match compares, as "tool calls in 3 rows, text in 2; thoughts are not compared"."""
    kinds = kinds_of(truths)
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    words = [f"{kind} in {count} rows" for kind, count in counts.items()] if len(counts) > 1 else list(counts)
    thoughts = any(truth.thought_end for truth in truths)
    return ", ".join(words) + "; thoughts are not compared" * thoughts


def same(output: str, truth: str, kind: Kind) -> bool:
    """Compare two answers as stripped text, or by structure: in JSON true is not 1, and white space does not count."""
    if kind == "tool calls":
        return _structure(output) == _structure(truth)
    if kind == "text":
        return output.strip() == truth.strip()
    value = parsed(output)
    return value is not None and canonical(value) == canonical(parsed(truth))


def _thought_end(row: Row, answer: str, special: list[str]) -> tuple[str, str]:
    """Return what ends the thought of an answer, "" without one, and what follows it."""
    if _THOUGHT_END in answer:
        return _THOUGHT_END, answer.rpartition(_THOUGHT_END)[2]
    thought = str(row.messages[-1].get("reasoning_content") or "").strip()
    _, is_there, after = answer.partition(thought) if thought else ("", "", "")
    if not is_there:
        return "", answer
    content = str(row.messages[-1].get("content") or "").strip()
    end, has_content, rest = after.partition(content) if content else ("", "", "")
    if has_content and end.strip():
        return end.strip(), content + rest
    end = next((token for token in special if token and after.lstrip().startswith(token)), "")
    return (end, after.lstrip()[len(end) :]) if end else ("", answer)


def _structure(text: str) -> list[str]:
    """Return the JSON objects and arrays in a text in their canonical form, and the words between them."""
    decoder = json.JSONDecoder(parse_constant=refuse_constant)
    pieces, words, at = [], "", 0
    while at < len(text):
        if text[at] in "{[":
            try:
                value, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                pass
            else:
                pieces += [*words.split(), canonical(value)]
                words, at = "", end
                continue
        words += text[at]
        at += 1
    return [*pieces, *words.split()]
