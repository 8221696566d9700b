"""What a disk lacks, in words: an error of the system, or one that a library hides in its own."""

import errno
import os
import re
import shutil
from pathlib import Path

from llmtune.errors import causes
from llmtune.numbers import size

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REASONS = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.EIO: "the disk reports an input/output error",
    errno.EFBIG: "the file is larger than its file system, or `ulimit -f`, allows",
    errno.EMFILE: "too many files are open; `ulimit -n` raises the limit",
    errno.ENFILE: "too many files are open on this machine",
    errno.ESTALE: "the network disk lost it",
}
_GONE = "no such file or folder; was it removed while llmtune ran?"
_HIDDEN_ERRNO = re.compile(r"os error (\d+)|\[Errno (\d+)\]")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container")


def disk_fault(error: BaseException, folder: Path | None = None, others: bool = False) -> str | None:
    """Say what a disk lacks, with the error's notes, if an error or what caused it means that; else None.

    `folder` is named where the error names no file. `others` has every other error of the system told too, such as a
    file that is not there.
    """
    chain = list(causes(error))
    fault = next((words for one in chain if (words := _fault(one, folder, others))), None)
    notes = [note for one in chain for note in getattr(one, "__notes__", [])]
    return "; ".join([fault, *notes]) if fault else None


def _fault(error: BaseException, folder: Path | None, others: bool) -> str | None:
    number, file = _number(error), getattr(error, "filename", None)
    reason = _REASONS.get(number) if number is not None else _reason_of_torch(error)
    if others and number is not None and reason is None:
        reason = _GONE if number == errno.ENOENT else os.strerror(number)
    if reason is None:
        return None
    place = Path(os.fsdecode(file)) if isinstance(file, (str, bytes)) else folder
    free = f" ({_free(place)})" if place and (number is None or number in _FULL) else ""
    return f"{f'{place}: ' if place else ''}{reason}{free}"


def _reason_of_torch(error: BaseException) -> str | None:
    return "a file could not be written" if _TORCH_WRITER.search(str(error)) else None


def _number(error: BaseException) -> int | None:
    """The system's number of an error, which libraries may hide in their own message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    hidden = _HIDDEN_ERRNO.search(str(error))
    return int(hidden[1] or hidden[2]) if hidden else None


def _free(place: Path) -> str:
    """How much space is free on the disk of a file or folder, in words."""
    place = place.absolute()
    nearest = next(folder for folder in (place, *place.parents) if folder.exists())
    usage = shutil.disk_usage(nearest)
    return f"{size(usage.free)} of {size(usage.total)} free"
