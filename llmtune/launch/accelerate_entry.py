"""`accelerate launch` without torchrun's pages about a process that failed: llmtune says in one line what was wrong."""

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
