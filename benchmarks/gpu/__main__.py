"""`python -m benchmarks.gpu correct|speed`: the GPU check."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu import correct, speed
from benchmarks.gpu.report import Report
from llmtune.errors import MachineError

COMMANDS = {"correct": correct, "speed": speed}
MEMORY = Path("/dev/shm")
ROOM = 12 * 2**30
"""Bytes of main memory that models and runs may take; with less there, they lie in a folder of the disk."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options of the check."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file too")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="270 for correct, 330 for speed")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts alone")
    parser.add_argument("--device", choices=("cpu",), help="try the check itself on a machine without a GPU")
    parser.add_argument("--model", choices=("tiny", "mid", "1b"), help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = list(COMMANDS[options.command].SHARES)
    for part in options.only:
        if part not in known:
            parser.error(f"{options.command} has no part {part}; its parts are {', '.join(known)}")
    return options


def find_device(named: str | None) -> str:
    """cpu where that is named, else cuda; raises MachineError where torch finds no GPU that it can use."""
    if named:
        return named
    import torch

    from llmtune.machine.device import run_device

    if run_device().type == "cuda":
        return "cuda"
    raise MachineError(f"torch {torch.__version__} finds no GPU here; --device cpu tries the check itself on the CPU")


def work_folder() -> Path:
    """A fresh folder for models and runs: in main memory where there is room."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    return Path(tempfile.mkdtemp(prefix="llmtune-gpu-", dir=MEMORY if roomy else None))


def main(arguments: list[str] | None = None) -> int:
    """Run one command of the check; gives the exit code: 0, 1 where something failed, 3 without a GPU."""
    options = parse(arguments)
    try:
        device = find_device(options.device)
    except MachineError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return error.exit_code
    command, report, folder = COMMANDS[options.command], Report(options.command), work_folder()
    model = options.model or ("tiny" if device == "cpu" else None)
    try:
        command.run(correct.Check(device, folder, report, model), options.only, options.deadline or command.DEADLINE)
    finally:
        if options.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
