"""Silence libraries in a process that llmtune started; importing llmtune silences nothing."""

import logging
import os
import sys
import warnings

from llmtune.launch.faults import VERBOSE


def quiet_libraries() -> None:
    """Let the process, and its children, print errors of libraries alone: no warnings and no progress bars.

    A process calls it before it imports bitsandbytes, which warns at import of kernels that llmtune never fetches.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\.")
    # PEFT compares the patterns of ranks with layers alone: tensors of experts have them too.
    unmatched = r"The following (rank|alpha)_pattern keys did not match any targeted module"
    warnings.filterwarnings("ignore", message=unmatched, category=RuntimeWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" in sys.modules:  # it read these variables when it was imported
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        set_verbosity_error()
        disable_progress_bar()


def is_verbose() -> bool:
    """Whether a user asked, by --verbose or by its variable, that nothing is hidden; children are told too."""
    return os.environ.get(VERBOSE, "") not in ("", "0")
