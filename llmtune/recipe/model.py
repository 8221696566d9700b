"""The `model` section: which base, and in which form it is in memory."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llmtune.fields import Closed, listed


class Model(Closed):
    """The base model."""

    base: Annotated[str, Field(min_length=1)]
    """A Hub id, a folder, a .gguf file, or package:NAME for a model that an installed Python package carries."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id; the commit it means is pinned when the run starts."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """4bit puts the frozen linear layers into NF4 with double quantization, 8bit into LLM.int8."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of computation; trained tensors are always kept in fp32. auto: bf16 where the machine has it, else fp16
    on a GPU and fp32 on a CPU. fp16, for GPUs alone, scales the loss."""
    start: str | None = None
    """A run, an adapter's folder or its Hub id (owner/name@revision): training goes on from it, on the same base."""
    merge_into: str | None = None
    """The 16-bit model that the delta is merged into, where the base is stored quantized: a Hub id or a folder."""
    add_tokens: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """New tokens, each a word of its own from then on; their embeddings are trained."""
