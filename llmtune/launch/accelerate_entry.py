"""`accelerate launch` without torchrun's long report of a failed process: llmtune reports the error in one line."""

import logging
import sys

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

if __name__ == "__main__":
    logging.disable()
    try:
        main()
    except ChildFailedError:
        sys.exit(1)
