"""`python -m llmtune`: the command line."""

import sys

from llmtune.cli import main

sys.exit(main())
