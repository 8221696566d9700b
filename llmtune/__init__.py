"""llmtune: fine-tune a language model from a recipe. A method is an adapter and a plan."""

import logging

# On a CPU it warns at import that a kernel was not fetched from the Hub; nothing is fetched here on purpose.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
