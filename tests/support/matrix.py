"""Every method x adapter x architecture: `python -m tests.support.matrix` writes the table of docs/methods.md."""

import gc
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.adapters.delta import load_delta, save_delta
from llmtune.errors import FieldError, PlanError
from llmtune.merging.shards.merge import merge_by_shards
from llmtune.model.base import Base, load_model
from llmtune.plan.stages import Facts
from tests.support import ROOT, architectures, tiny, training

DOCUMENT = ROOT / "docs" / "methods.md"
BOTH = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt", "mixtral")
"""Types that are tried with tied embeddings and with others."""
RECENT = (
    "phi3",
    "gemma4_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "gpt_oss",
    "phimoe",
    "deepseek_v3",
    "bamba",
    "falcon_h1",
    "nemotron_h",
    "jamba",
    "zamba2",
    *architectures.RECENT,
)
"""Types that are tried as their configuration ties them."""
KINDS = (*BOTH, *RECENT)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "frozen": {"kind": "frozen", "reach": 1},
    "gradual": {"kind": "gradual", "reaches": [1, 2, "all"]},
    "discriminative": {"kind": "discriminative"},
    "ulmfit": {"kind": "gradual", "reaches": [1, 2, "all"], "decay": 1 / 2.6},
    "lisa": {"kind": "lisa", "blocks": 2, "every": 1},
}
ADAPTERS: dict[str, Any] = {
    "none": {"kind": "none"},
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "ia3": {"kind": "ia3"},
    "bottleneck": {"kind": "bottleneck", "size": 4},
    "vera": {"kind": "vera", "rank": 8},
}
RATES: dict[str, tuple[dict[str, Any], float]] = {
    "none, all blocks": ({"kind": "none"}, 1.0),
    "none, half of the blocks": ({"kind": "none"}, 0.5),
    "none, the head alone": ({"kind": "none"}, 0.0),
    "lora, alpha 32": ({"kind": "lora"}, 1.0),
    "lora, alpha 32, pissa": ({"kind": "lora", "init": "pissa"}, 1.0),
    "lora, alpha 32, olora": ({"kind": "lora", "init": "olora"}, 1.0),
    "ia3": ({"kind": "ia3"}, 1.0),
    "bottleneck": ({"kind": "bottleneck"}, 1.0),
    "vera": ({"kind": "vera"}, 1.0),
}
"""The rows of the table of default rates: an adapter, and the share of the blocks that trains."""
GOOD = "yes"
IDS = torch.arange(3, 40)[None]


@dataclass(frozen=True)
class Cell:
    """One method with one adapter on one tiny model of three blocks."""

    kind: str
    tied: bool
    adapter: str
    method: str

    @property
    def name(self) -> str:
        """A name that can be a folder's."""
        return f"{self.kind}-{'tied' if self.tied else 'untied'}-{self.adapter}-{self.method}"


def embeddings(kind: str) -> tuple[bool, ...]:
    """Whether the cells of a type have tied embeddings: first those that do."""
    return (True, False) if kind in BOTH else (bool(AutoConfig.for_model(kind).tie_word_embeddings),)


ROWS = [(kind, tied) for kind in KINDS for tied in embeddings(kind)]
CELLS = [Cell(kind, tied, *rest) for (kind, tied), *rest in product(ROWS, ADAPTERS, METHODS)]


def spread() -> list[Cell]:
    """Cells that have, with each type, every adapter and every method once, and every pair of those among them."""
    methods = list(METHODS)
    cells = []
    for number, kind in enumerate(KINDS):
        tied = cycle(embeddings(kind)[:: 1 if number % 2 else -1])
        for index, adapter in enumerate(ADAPTERS):
            cells.append(Cell(kind, next(tied), adapter, methods[(number + index) % len(methods)]))
    return cells


def half(cells: list[Cell], number: int) -> list[Cell]:
    """The cells of every other type, from the first or from the second on."""
    return [cell for cell in cells if KINDS.index(cell.kind) % 2 == number]


def base_of(cell: Cell, folder: Path) -> Base:
    """The cell's base model, written on first use."""
    path = folder / f"base-{cell.kind}-{cell.tied}"
    if not path.exists():
        if cell.kind in BOTH:
            size = {"blocks": 3, **({"ffn_dim": 64, "intermediate_size": 96} if cell.kind == "opt" else {})}
        else:
            size = architectures.settings(cell.kind, blocks=3)
        tiny.save_base(path, cell.kind, tied=cell.tied, **size)
    return Base(path, "base", None, None)


def fill(cell: Cell, folder: Path) -> str:
    """Build, train three steps, save the delta, load it, merge it: `yes`, or the words of the refusal."""
    base = base_of(cell, folder)
    method = {**METHODS[cell.method], "lr": 0.01, "adapter": ADAPTERS[cell.adapter]}
    try:
        trainer = training.trainer(folder / "out", method, model=load_model(base), steps=3)
    except (FieldError, PlanError) as refusal:
        return str(refusal)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trained = trainer.current_tensors()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= set(trained), f"{cell.name}: {moved - set(trained)} moved"
    assert {trainer.distance[name] for name in moved} == {trainer.distance[name] for name in trained}, cell.name
    live = trainer.model.eval()(IDS).logits.detach()
    kind = ADAPTERS[cell.adapter]["kind"]
    save_delta(trainer.model, trainer.trained_state(), folder / cell.name, base, kind)
    save_file({"logits": live}, folder / cell.name / "live.safetensors")
    tuned = load_delta(load_model(base), folder / cell.name)
    torch.testing.assert_close(tuned(IDS).logits, live, rtol=0, atol=1e-5, msg=cell.name)
    merged = folder / f"{cell.name}-merged"
    merged.mkdir()
    merge_by_shards(base, folder / cell.name, IDS.tolist(), torch.float32).write(merged, base)
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    torch.testing.assert_close(stock(IDS).logits, live, rtol=0, atol=1e-4, msg=cell.name)
    return GOOD


def reload(folder: Path, cells: Iterable[Cell]) -> None:
    """Load the deltas of cells that trained and compare their logits with the live models'; for a fresh process."""
    for cell in cells:
        if (folder / cell.name).exists():
            live = load_file(folder / cell.name / "live.safetensors")["logits"]
            loaded = load_delta(load_model(base_of(cell, folder)), folder / cell.name)(IDS).logits
            torch.testing.assert_close(loaded, live, rtol=0, atol=1e-5, msg=cell.name)


def results(cells: list[Cell], folder: Path) -> dict[Cell, str]:
    """What each cell came to, one delta in five loaded in a fresh process, which has every adapter among them."""
    outcomes = {cell: fill(cell, folder) for cell in cells}
    names = [cell.name for cell, words in outcomes.items() if words == GOOD]
    subprocess.run(
        [sys.executable, "-m", "tests.support.matrix", "reload", folder, *names[::5]],
        check=True,
        cwd=DOCUMENT.parents[1],
    )
    return outcomes


def table(outcomes: dict[Cell, str]) -> str:
    """The Markdown table of all results: a row a model, what differs between methods named, refusals numbered below."""
    notes: dict[str, int] = {}
    lines = ["| model | embedding | " + " | ".join(ADAPTERS) + " |", "|---" * (2 + len(ADAPTERS)) + "|"]
    for kind, tied in ROWS:
        row = []
        for adapter in ADAPTERS:
            words = [outcomes[Cell(kind, tied, adapter, method)].replace(f" {kind};", " TYPE;") for method in METHODS]
            shown = [one if one == GOOD else f"refused [{notes.setdefault(one, len(notes) + 1)}]" for one in words]
            most = max(shown, key=shown.count)
            others = [f"{method}: {one}" for method, one in zip(METHODS, shown, strict=True) if one != most]
            row.append(", ".join([most, *others]))
        lines.append(f"| {kind} | {'tied' if tied else 'untied'} | " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *(f"[{number}] `{words}`\n" for words, number in notes.items())]).rstrip()


def parse(text: str) -> dict[Cell, str]:
    """The outcome of each cell by a document's table."""
    notes = {f"refused [{number}]": words for number, words in re.findall(r"^\[(\d+)\] `(.*)`$", text, re.M)}
    notes[GOOD] = GOOD
    outcomes = {}
    for line in text.splitlines():
        row = [part.strip() for part in line.strip("|").split("|")]
        if len(row) == 2 + len(ADAPTERS) and row[0] in KINDS:
            for adapter, shown in zip(ADAPTERS, row[2:], strict=True):
                most, *others = shown.split(", ")
                by_method = dict.fromkeys(METHODS, most) | dict(one.split(": ") for one in others)
                for method, one in by_method.items():
                    words = notes[one].replace(" TYPE;", f" {row[0]};")
                    outcomes[Cell(row[0], row[1] == "tied", adapter, method)] = words
    return outcomes


def default_rates() -> str:
    """The Markdown table of default learning rates at the output."""
    sizes = {"135M": 135_000_000, "1B": 10**9, "8B": 8 * 10**9, "70B": 70 * 10**9}
    lines = ["| adapter | " + " | ".join(sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
    for name, (adapter, share) in RATES.items():
        spec = training.spec({"kind": "full", "adapter": adapter}).method.adapter
        rates = [spec.default_rate(Facts(blocks=32, hidden=64, parameters=size), share) for size in sizes.values()]
        lines.append(f"| {name} | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    return "\n".join(lines)


def between(text: str, name: str, content: str) -> str:
    """The document with what stands between the marks of `name` replaced."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    return text[: text.index(start) + len(start)] + f"\n\n{content}\n\n" + text[text.index(end) :]


def main(arguments: list[str]) -> None:
    """Without arguments, fill every cell in two processes and write the document."""
    if arguments[:1] == ["reload"]:
        reload(Path(arguments[1]), [cell for cell in CELLS if cell.name in set(arguments[2:])])
        return
    if arguments[:1] == ["fill"]:
        gc.freeze()  # every trainer collects garbage, and what the imports made takes longer than training does
        folder = Path(arguments[1])
        names = set((folder / "cells").read_text(encoding="utf-8").splitlines())
        outcomes = results([cell for cell in CELLS if cell.name in names], folder)
        lines = [f"{cell.name}\t{words}\n" for cell, words in outcomes.items()]
        (folder / "results").write_text("".join(lines), encoding="utf-8")
        return
    text = between(DOCUMENT.read_text(encoding="utf-8"), "matrix", table(fill_all(CELLS)))
    DOCUMENT.write_text(between(text, "rates", default_rates()), encoding="utf-8")


def fill_all(cells: list[Cell]) -> dict[Cell, str]:
    """What many cells came to: a half of the types in each of two processes."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def fill_half(number: int) -> dict[str, str]:
            out = Path(folder) / str(number)
            out.mkdir()
            (out / "cells").write_text("\n".join(cell.name for cell in half(cells, number)), encoding="utf-8")
            command = [sys.executable, "-m", "tests.support.matrix", "fill", str(out)]
            subprocess.run(command, check=True, cwd=DOCUMENT.parents[1], capture_output=True)
            return dict(line.split("\t") for line in (out / "results").read_text(encoding="utf-8").splitlines())

        outcomes = {name: words for part in pool.map(fill_half, range(2)) for name, words in part.items()}
    return {cell: outcomes[cell.name] for cell in cells}


if __name__ == "__main__":
    main(sys.argv[1:])
