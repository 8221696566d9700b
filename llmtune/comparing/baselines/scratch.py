"""The scratch baseline: the base's architecture from random weights, to be trained like an arm."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmtune.arms.arm import Arm
from llmtune.errors import LlmtuneError
from llmtune.files import digest_of, read_json, write_folder, write_json
from llmtune.model.base import Base, build_skeleton, load_config, model_facts
from llmtune.model.files.fingerprints import COPIED, named_like, weights_digest
from llmtune.model.files.quantization import without_quantization
from llmtune.model.kinds import auto_class
from llmtune.working import working

FACTS = "scratch.json"
_RATE, _PARAMETERS, _POWER = 1e-3, 1.35e8, 0.4
"""The rate at and below so many parameters, and how it falls above them.

GPT-3 was trained from random weights at 6e-4 with 125M parameters and 1.2e-4 with 6.7B (arXiv 2005.14165, table 2.1),
a fall by this power; SmolLM2 at 3e-3 with 135M. The rate between both suits short trainings, and is searched around.
"""


def scratch_arm(base: Base, folder: Path, seed: int) -> Arm:
    """The arm that trains the base's architecture from random weights, which are written to `folder` once a seed.

    Raises FieldError where the base is damaged, OSError where a disk has no room.
    """
    facts = {"base": weights_digest(base), "seed": seed, "torch": torch.__version__}
    if not _is_complete(folder, facts):
        _write(base, folder, seed, facts)
    rate = learning_rate(model_facts(build_skeleton(base)).parameters)
    whole = ("model.revision=null", "model.start=null", "model.add_tokens=[]", "model.quantize=none")
    return Arm("scratch", (f"model.base={folder.absolute()}", *whole, f"method={{kind: full, lr: {rate:.1e}}}"))


def learning_rate(parameters: int) -> float:
    """The rate at which a model of so many parameters is trained from random weights."""
    return float(_RATE * min(1.0, (_PARAMETERS / parameters) ** _POWER))


def random_model(base: Base, seed: int) -> PreTrainedModel:
    """The base's architecture as transformers starts it under a seed: in fp32, then in the base's own precision.

    A base in few bits is started in whole. No random state of the process changes.
    """
    config = without_quantization(load_config(base))
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
    started: PreTrainedModel = model.to(dtype)
    return started


def _is_complete(folder: Path, facts: Mapping[str, object]) -> bool:
    try:
        return bool(read_json(folder / FACTS) == {"facts": facts, "files": _sizes(folder)})
    except LlmtuneError:
        return False


def _sizes(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != FACTS)
    return digest_of([[file.relative_to(folder).as_posix(), file.stat().st_size] for file in files])


def _write(base: Base, folder: Path, seed: int, facts: Mapping[str, object]) -> None:
    with working("drawing random weights"), write_folder(folder) as partial:
        random_model(base, seed).save_pretrained(partial)
        for file in named_like(base.folder, COPIED):
            target = partial / file.relative_to(base.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        write_json(partial / FACTS, {"facts": facts, "files": _sizes(partial)})
