"""A tokenizer in GGUF's terms: tokens, merges, special tokens, and the name by which llama.cpp splits text."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFReader, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from llmtune.errors import MachineError
from llmtune.exporting.gguf.architecture import HOW

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WHOLE_PIECES = {"llama-bpe": True, "tekken": True, "qwen2": False, "qwen35": False}
"""llama.cpp's ways to split text by a pattern, and whether it takes a piece that is a token before any merge."""
GPT2 = "gpt-2"
_PRE = "tokenizer.ggml.pre"


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a folder of weights, as a GGUF file holds it."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    stop: set[int]
    """The ids that end an answer."""
    size: int
    """The rows of the embeddings."""
    pre: str
    """llama.cpp's name for how text is split before merges."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a token before each text."""
        ids = self.tokenizer("a").input_ids
        return self.tokenizer.bos_token_id is not None and ids[:1] == [self.tokenizer.bos_token_id]

    @cached_property
    def ends(self) -> dict[str, int]:
        """The stop tokens by the names that GGUF has for them: eos, eot and eom; llama.cpp stops at each."""
        own = self.tokenizer.eos_token_id
        order = sorted(self.stop, key=lambda token: (token != own, token))
        return dict(zip(("eos", "eot", "eom"), order, strict=False))

    def add(self, writer: "GGUFWriter") -> None:
        """Write tokens, merges, special tokens and the chat template."""
        names = {index: token for token, index in self.tokenizer.get_vocab().items()}
        added = self.tokenizer.added_tokens_decoder
        tokens, types = [], []
        for index in range(self.size):
            token = added.get(index)
            kind = TokenType.NORMAL if index in names else TokenType.UNUSED
            if token is not None:
                kind = TokenType.CONTROL if token.special or index in self.stop else TokenType.USER_DEFINED
            tokens.append(names.get(index, f"[PAD{index}]"))
            types.append(kind)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        special = SpecialVocab(self.folder, load_merges=True, n_vocab=self.size)
        special.special_token_ids.update({name: index for name, index in self.ends.items() if name == "eos"})
        special.add_special_token.clear()
        special.add_special_token.update(bos=self.adds_bos, eos=False)
        special.chat_template = self.tokenizer.chat_template
        special.add_to_gguf(writer, quiet=True)
        for name, index in self.ends.items():
            if name != "eos":
                getattr(writer, f"add_{name}_token_id")(index)


def read_pre(file: Path) -> str | None:
    """The way to split text that a .gguf file names, where its tokens are of bytes; None for other tokenizers."""
    fields = GGUFReader(file).fields
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get(_PRE)
    return str(pre.contents()) if kind and pre and kind.contents() == "gpt2" else None


def find_pre(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """llama.cpp's name for how a tokenizer splits text, by what it does once it is loaded.

    Raises MachineError for a tokenizer that the gguf package alone cannot write; `name` is the model's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # the class may split otherwise than tokenizer.json says
    content: dict[str, Any] = json.loads(backend.to_str()) if backend else {}
    model, normalizer = content.get("model") or {}, content.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        kind = model.get("type") or type(tokenizer).__name__
        kind += {"BPE": " with byte fallback" if model.get("byte_fallback") else " without merges"}.get(kind, "")
        raise MachineError(
            f"{name}: the gguf package alone writes tokenizers of bytes with merges, not this {kind}; {HOW}"
        )
    steps = _steps(content.get("pre_tokenizer"))
    whole = bool(model.get("ignore_merges"))
    if (normalizer or {}).get("type") in (None, "NFC"):
        kinds = [step["type"] for step in steps]
        bytes_alone = bool(steps) and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
        by_pattern = bytes_alone and steps[-1].get("use_regex", True)
        if by_pattern and not whole and kinds == ["ByteLevel"]:
            return GPT2
        if by_pattern and not whole and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if bytes_alone and not by_pattern and kinds == ["Split", "ByteLevel"]:
            pattern = (steps[0].get("pattern") or {}).get("Regex")
            for pre, takes_whole in _WHOLE_PIECES.items():
                if GGUF_PRE_TOKENIZER_SPLITS.get(pre) == pattern and whole == takes_whole:
                    return pre
    raise MachineError(f"{name}: its tokenizer splits text in a way that is not known here by llama.cpp's name; {HOW}")


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's pre-tokenizer."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return list(steps)
