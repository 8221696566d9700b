"""llama.cpp itself, where llama-cpp-python is installed: its tokens, and its greedy answers to the same rows."""

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmtune.errors import ProofError
from llmtune.exporting.rows import Prompts
from llmtune.working import working

LEAST_EQUAL = 0.25
"""Share of answers that must be the same: it computes in other types than PyTorch, so near ties fall otherwise."""
_SHOWN = 80


def compare(
    file: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str], prompts: Prompts, merged: list[list[int]]
) -> dict[str, Any]:
    """Count the answers that are the merged model's; raises ProofError for other tokens, or for too few answers."""
    library: Any = import_module("llama_cpp")
    longest = max(map(len, prompts.ids), default=0) + prompts.new_tokens
    with working(f"reading {file.name} with llama.cpp"):
        model: Any = library.Llama(str(file), n_ctx=max(512, longest), n_gpu_layers=0, verbose=False)
    for text in texts:
        expected, ids = tokenizer(text).input_ids, model.tokenize(text.encode(), add_bos=True, special=True)
        if ids != expected:
            raise ProofError(f"llama.cpp reads {text[:60]!r} as {ids[:12]}, not as {expected[:12]}: {file.name}")
    others = []
    with working("answering rows with llama.cpp", len(prompts.ids), "rows") as step:
        for prompt in prompts.ids:
            others.append(_answer(model.generate(prompt, temp=0.0, repeat_penalty=1.0), prompts))
            step()
    differing = [row for row, (one, other) in enumerate(zip(merged, others, strict=True)) if one != other]
    equal = len(merged) - len(differing)
    if equal < LEAST_EQUAL * len(merged):
        row = differing[0]
        ours, other = (tokenizer.decode(one[row])[:_SHOWN] for one in (merged, others))
        raise ProofError(
            f"llama.cpp answers {len(differing)} of {len(merged)} rows otherwise than the merged model: "
            f"row {row + 1} has {other!r}, and the merged model answers {ours!r}; nothing was exported"
        )
    return {"version": library.__version__, "equal": equal}


def _answer(tokens: Iterator[int], prompts: Prompts) -> list[int]:
    """The tokens that llama.cpp generates for a prompt, up to the first stop token and with it."""
    answer: list[int] = []
    for token in islice(tokens, prompts.new_tokens):
        answer.append(int(token))
        if token in prompts.stop:
            break
    return answer
