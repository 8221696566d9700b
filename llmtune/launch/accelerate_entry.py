"""`accelerate launch` without torchrun's long report of a failed process: llmtune reports the error in one line."""

import logging
import signal
import sys

from llmtune.launch.process import leave_code
from llmtune.working import use_stdout, working

if __name__ == "__main__":
    use_stdout()
    with working("loading accelerate and torch"):
        from accelerate.commands.launch import main
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    logging.disable()
    try:
        main()
    except ChildFailedError as error:
        signals = [-failure.exitcode for failure in error.failures.values() if failure.exitcode < 0]
        if signals:  # no process could report one itself
            leave_code(128 + min(signals, key=lambda number: (number == signal.SIGTERM, number)))
        sys.exit(1)
