"""llama.cpp's own converter, run as a process of its own where the user names its folder."""

import os
import subprocess
import sys
from pathlib import Path

from llmtune.errors import LONGEST_LINE, MachineError, ProofError, one_line
from llmtune.working import working

SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("bf16", "f16", "f32", "q8_0")
"""The types that it writes."""
_VARIABLE = "LLAMA_CPP"


def converter_folder(option: Path | None) -> Path | None:
    """The folder of --llama-cpp, else of $LLAMA_CPP."""
    named = os.environ.get(_VARIABLE)
    return option or (Path(named) if named else None)


def check(folder: Path, kind: str) -> None:
    """Raise MachineError where the folder has no converter, or the converter does not write the type."""
    if not (folder / SCRIPT).is_file():
        how = "git clone https://github.com/ggml-org/llama.cpp, then --llama-cpp llama.cpp"
        raise MachineError(f"{folder}: holds no {SCRIPT}; get it with: {how}")
    if kind not in TYPES:
        raise MachineError(f"llama.cpp's converter writes {', '.join(TYPES)}, not {kind}; choose one of them")


def convert(folder: Path, merged: Path, file: Path, kind: str) -> None:
    """Let the converter write merged weights to a file; raises ProofError with its last line where it fails.

    Raises MachineError where it lacks a package, or does not know the architecture.
    """
    command = [sys.executable, str((folder / SCRIPT).absolute()), str(merged.absolute())]
    command += ["--outfile", str(file.absolute()), "--outtype", kind]
    with working("converting with llama.cpp"):
        child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if child.returncode or not file.is_file():
        lines = child.stderr.strip().splitlines() or ["it wrote no file"]
        if "ModuleNotFoundError" in lines[-1]:
            fix = f"pip install -r {folder / 'requirements.txt'}"
            raise MachineError(f"llama.cpp's converter lacks a package: {one_line(lines[-1], LONGEST_LINE)}; {fix}")
        if "is not supported" in lines[-1]:
            raise MachineError(f"llama.cpp's converter cannot write this model: {one_line(lines[-1], LONGEST_LINE)}")
        raise ProofError(f"llama.cpp's converter failed: {one_line(lines[-1], LONGEST_LINE)}")
