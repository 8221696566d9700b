"""Reads a GGUF file back by transformers, which did not write it, and compares its tokens with a tokenizer's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from llmtune.errors import MachineError, ProofError, first_line, lacks_memory
from llmtune.exporting.gguf.architecture import head_size, rope_factors
from llmtune.exporting.gguf.vocabulary import GPT2, Vocabulary, read_pre
from llmtune.exporting.gguf.write import ROPE
from llmtune.working import working


def read_model(file: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model in a GGUF file, in fp32, on the CPU; `config` is that of the weights that were written.

    Raises ProofError where transformers cannot read the file, MachineError where it does not know the architecture.
    """
    # What the reader does not read for each architecture; `check_sizes` compares what the file has.
    options = {key: getattr(config, key) for key in ("head_dim", "rope_parameters") if getattr(config, key, None)}
    with working(f"reading {file.name} with transformers"):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
        except Exception as error:
            if lacks_memory(error):
                raise
            if "not supported" in str(error):
                raise MachineError(
                    f"transformers cannot read this GGUF file, so nothing proves it: {first_line(error)}"
                ) from error
            raise ProofError(f"{file.name} cannot be read back: {first_line(error)}") from error
    return model.eval()


def check_sizes(file: Path, config: PreTrainedConfig) -> None:
    """Raise ProofError where a file names another head size or context or rotary base than the weights have."""
    content = GGUFReader(file)
    fields, factors = content.fields, rope_factors(config)
    architecture = str(fields["general.architecture"].contents())
    expected = {
        "attention.key_length": head_size(config),
        "context_length": config.max_position_embeddings,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    for key, value in expected.items():
        field = fields.get(f"{architecture}.{key}")
        if field is not None and float(field.contents()) != float(value):
            raise ProofError(f"{file.name}: {architecture}.{key} is {field.contents()}, but should be {value}")
    stored = [tensor.data for tensor in content.tensors if tensor.name == ROPE]
    if factors is not None and not (stored and np.allclose(stored[0], factors, rtol=1e-4)):
        raise ProofError(f"{file.name}: {ROPE}, by which rotary positions are stretched, is missing or another")


def check_tokens(file: Path, vocabulary: Vocabulary, texts: list[str], prompts: list[list[int]]) -> list[str]:
    """Compare the file's tokens, special ids, template and stop tokens with the tokenizer's; gives the stop tokens.

    Raises ProofError with the first difference: these make most of the garbage that people see.
    """
    with working(f"reading the tokens of {file.name}"):
        fields = GGUFReader(file).fields
        own = vocabulary.tokenizer
        read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        tokens = fields["tokenizer.ggml.tokens"].contents()
        if read_pre(file) not in (GPT2, *GGUF_PRE_TOKENIZER_SPLITS):  # transformers knows the rest of the file alone
            read.backend_tokenizer.pre_tokenizer = own.backend_tokenizer.pre_tokenizer

    stops = _check_stops(file, fields, vocabulary)
    if len(tokens) != vocabulary.size:
        raise ProofError(f"{file.name} has {len(tokens)} tokens, and the tuned model has {vocabulary.size}")
    for token, index in own.get_vocab().items():
        if tokens[index] != token:
            raise ProofError(f"{file.name}: token {index} is {tokens[index]!r}, but should be {token!r}")
    template = fields.get("tokenizer.chat_template")
    if (str(template.contents()) if template else None) != own.chat_template:
        raise ProofError(f"{file.name}: its chat template is not the tuned model's")
    pairs = [(own(text).input_ids, read(text).input_ids) for text in texts]
    unchanged = [(prompt, own.decode(prompt)) for prompt in prompts if _encode(own, own.decode(prompt)) == prompt]
    for ids, again in [*pairs, *((prompt, _encode(read, text)) for prompt, text in unchanged)]:
        if ids != again:
            text = own.decode(ids)[:60]
            raise ProofError(f"{file.name}: its tokenizer reads {text!r} as {again[:12]}, not as {ids[:12]}")
    return [own.decode([token]) for token in sorted(stops)]


def _check_stops(file: Path, fields: dict[str, Any], vocabulary: Vocabulary) -> set[int]:
    """The tokens at which llama.cpp stops by the file; raises ProofError where one of the tuned model's is missing."""
    named = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stops = {int(field.contents()) for field in named if field is not None}
    if missing := {*vocabulary.ends.values()} - stops:  # GGUF has names for three
        names = ", ".join(repr(vocabulary.tokenizer.decode([token])) for token in sorted(missing))
        raise ProofError(f"{file.name} does not stop at {names}, where the tuned model ends its answers")
    return stops


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that holds its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)
