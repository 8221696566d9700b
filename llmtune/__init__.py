"""llmtune: fine-tune a language model from a recipe. A method is an adapter and a plan."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtune.api import Recipe, combine, evaluate, export, infer, merge, publish, report, train
    from llmtune.comparing.compare import compare
    from llmtune.tuning.step import tune

__all__ = [
    "Recipe",
    "combine",
    "compare",
    "evaluate",
    "export",
    "infer",
    "merge",
    "publish",
    "report",
    "train",
    "tune",
]
_ABOVE = {"compare": "llmtune.comparing.compare", "tune": "llmtune.tuning.step"}
"""The modules of functions that stand above the others."""
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the API when a name of it is first used: `import llmtune` alone stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'llmtune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ABOVE.get(name, "llmtune.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
