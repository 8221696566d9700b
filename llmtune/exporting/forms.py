"""The forms that a run is exported to, and the words by which `--to` names them."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from llmtune.errors import RecipeError, nearest
from llmtune.run import Run

GGUF_TYPES = ("bf16", "f16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""The types that the gguf package can write, from the nearest to the weights to the smallest file."""


@dataclass(frozen=True)
class Export:
    """What one export works on."""

    run: Run
    type: str
    """The type after the form's name, such as q8_0; "" for a form without types."""
    merged: Callable[[], Path]
    """Gives the folder of the merged weights, verified; merges first where that is not done."""
    llama_cpp: Path | None = None
    """The folder with llama.cpp's converter."""


class Writer(Protocol):
    """The module of a form: it checks, writes and proves, in this order."""

    def check(self, export: Export) -> None:
        """Raise MachineError, RecipeError or ProofError for what would end the export, before anything is written."""

    def write(self, export: Export, folder: Path) -> dict[str, Any]:
        """Write the form's files into an empty folder and return facts for the manifest."""

    def prove(self, export: Export, folder: Path) -> dict[str, Any]:
        """Return the facts of the proof that the files are the tuned model; raises ProofError where they are not."""

    def summary(self, folder: Path, facts: dict[str, Any]) -> list[str]:
        """Return the lines for people: what was written to `folder`, what was proved, and how to use it."""


@dataclass(frozen=True)
class Form:
    """A form of export: its name, its types, and its module."""

    name: str
    module: str
    types: tuple[str, ...] = ()
    """The types after a colon, the first by default; none where the form has no types."""
    keeps: bool = False
    """Whether its folder holds an export of each type side by side; otherwise a new export replaces the folder."""

    def writer(self) -> Writer:
        """The form's module, which may import torch."""
        return cast(Writer, import_module(self.module))

    def key(self, kind: str) -> str:
        """The name of an export in the manifest."""
        return f"{self.name}:{kind}" if self.keeps else self.name


FORMS = (
    Form("gguf", "llmtune.exporting.gguf.form", GGUF_TYPES, keeps=True),
    Form("ollama", "llmtune.exporting.ollama", GGUF_TYPES),
    Form("vllm", "llmtune.exporting.vllm.form", ("auto", "lora", "merged")),
    Form("mlx", "llmtune.exporting.mlx"),
)


def read_form(text: str) -> tuple[Form, str]:
    """The form and the type that a text such as gguf:q8_0 names; raises RecipeError with the nearest."""
    name, _, kind = text.strip().lower().partition(":")
    forms = {form.name: form for form in FORMS}
    if name not in forms:
        raise RecipeError(f"--to {text}: {name!r} is no form of export; there are {', '.join(forms)}{_near(name)}")
    form = forms[name]
    if kind and not form.types:
        raise RecipeError(f"--to {text}: {name} has no types; write --to {name}")
    if kind and kind not in form.types:
        raise RecipeError(f"--to {text}: {_unknown_type(form, kind)}")
    return form, kind or next(iter(form.types), "")


def check_converter(form: Form, llama_cpp: Path | None) -> None:
    """Raise RecipeError where llama.cpp's converter is named for a form that it does not write."""
    if llama_cpp and form.types != GGUF_TYPES:
        raise RecipeError(f"--llama-cpp {llama_cpp}: is for --to gguf and ollama; remove it for {form.name}")


def _near(name: str) -> str:
    return nearest(name, [form.name for form in FORMS])


def _unknown_type(form: Form, kind: str) -> str:
    if form.types == GGUF_TYPES and kind.startswith(("q", "iq", "tq")) and len(kind) > 1 and kind[-1] in "sml0kx":
        command = f"llama-quantize FILE.gguf OUT.gguf {kind.upper()}"
        return f"only llama.cpp's own program writes {kind}; export gguf:bf16, then: {command}"
    return f"{kind!r} is no type of {form.name}; there are {', '.join(form.types)}{nearest(kind, list(form.types))}"
