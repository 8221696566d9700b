"""The scratch baseline: the base's architecture from random weights, to be trained like an arm."""

import shutil
from pathlib import Path

import torch

from llmtune.arms.arm import Arm
from llmtune.files import write_folder
from llmtune.model.base import Base, load_config
from llmtune.model.files.fingerprints import COPIED, named_like
from llmtune.model.kinds import auto_class
from llmtune.working import working

RATE = "1.0e-3"
"""The rate at which models of this size are trained from random weights."""


def scratch_arm(base: Base, folder: Path, seed: int) -> Arm:
    """The arm that trains the base's architecture from random weights, which are written to `folder` once."""
    if not (folder / "config.json").is_file():
        _write(base, folder, seed)
    return Arm(
        "scratch", (f"model.base={folder.absolute()}", "model.revision=null", f"method={{kind: full, lr: {RATE}}}")
    )


def _write(base: Base, folder: Path, seed: int) -> None:
    config = load_config(base)
    with working("drawing random weights"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dtype = getattr(config, "dtype", None) or torch.float32
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        with write_folder(folder) as partial:
            model.save_pretrained(partial)
            for file in named_like(base.folder, COPIED):
                shutil.copyfile(file, partial / file.name)
