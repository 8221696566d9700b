"""`python -m llmtune`: the command line."""

import sys

from llmtune.cli import main

if __name__ == "__main__":  # processes that a command spawns import this file again
    sys.exit(main())
