"""The room that an export of merged weights takes, on the disk and in memory."""

import shutil

from llmtune.errors import FullMemoryError, MachineError
from llmtune.exporting.forms import Export
from llmtune.machine.device import free_bytes
from llmtune.merging.checks import CPU, count_weights, disk_bytes
from llmtune.model.base import Base
from llmtune.numbers import size


def check_room(export: Export, base: Base, written: int) -> None:
    """Raise MachineError where the disk lacks room for `written` bytes, and for a merge that is not done yet.

    Raises FullMemoryError where the proof, which holds two models in fp32, needs more memory than is free.
    """
    run = export.run
    needed = written + (0 if run.done("merge") else disk_bytes(base, run.recipe().merge.dtype))
    free = shutil.disk_usage(run.exported if run.exported.is_dir() else run.path).free
    if free < needed:
        raise MachineError(f"{run.path}: exporting needs {size(needed)} of disk, but only {size(free)} is free")
    memory, available = 8 * count_weights(base), free_bytes(CPU)
    if available < memory:
        raise FullMemoryError(
            f"the export is proved in float32, which takes {size(memory)} while what was written is read back, and "
            f"{size(available)} of memory is free; free some memory, or export on a larger machine"
        )
