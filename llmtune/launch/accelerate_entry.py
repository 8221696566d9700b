"""`accelerate launch` without torchrun's long report of a failed process: llmtune reports the error in one line."""

import logging
import os
import signal
import sys

from llmtune.errors import LONGEST_LINE, MachineError, first_line
from llmtune.launch.process import leave_code, report_failure
from llmtune.launch.quiet import is_verbose
from llmtune.launch.streams import outlive_readers
from llmtune.working import importing, own_process, use_stdout

if __name__ == "__main__":
    own_process()
    outlive_readers()
    use_stdout()
    # Else torch adds forty lines of C++ frames to a machine that is not reached; read at import, and not for children.
    hushed = "TORCH_CPP_LOG_LEVEL" not in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    with importing("loading accelerate and torch"):
        from accelerate.commands.launch import main
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    if hushed:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    if not is_verbose():
        logging.disable()
    try:
        main()
    except ChildFailedError as error:
        signals = [-failure.exitcode for failure in error.failures.values() if failure.exitcode < 0]
        if signals:  # no process could report one itself
            leave_code(128 + min(signals, key=lambda number: (number == signal.SIGTERM, number)))
        sys.exit(1)
    except (ConnectionError, DistError) as error:
        reason = first_line(error)[:LONGEST_LINE]
        sys.exit(report_failure(MachineError(f"the machines of the training did not meet: {reason}")))
