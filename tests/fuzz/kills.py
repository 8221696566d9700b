"""Kill trainings at random moments, go on with each, and compare what it leaves with a run that nothing stopped.

`python -m tests.fuzz.kills --kills 100`. Most trainings are forks of this process, which has loaded the libraries, so
that a kill costs a second and not ten; one in ten is `llmtune run` itself. Linux only.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz.killed import SIGNALS, Bench, Kill, differences

RECIPES: dict[str, dict[str, Any]] = {
    "gradual": {"method": {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01}, "frozen_blocks": "recompute"},
    "lora": {
        "method": {
            "kind": "gradual",
            "reaches": [1, 2, 3],
            "lr": 0.01,
            "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "init": "pissa", "dropout": 0.1},
        },
        "frozen_blocks": "cache",
    },
    "frozen": {"method": {"kind": "frozen", "reach": 1, "lr": 0.01}, "frozen_blocks": "cache"},
}
SHARES = {"gradual": 0.6, "lora": 0.2, "frozen": 0.2}
"""How the kills are shared out."""


class Killer:
    """Kills runs of one recipe until it has killed often enough, and counts what that did."""

    def __init__(self, bench: Bench, kills: int, rng: random.Random, by_command: float) -> None:
        self.bench, self.kills, self.rng, self.by_command = bench, kills, rng, by_command
        self.counts, self.moments, self.signals = Counter[str](), Counter[str](), Counter[str]()
        self.faults: list[str] = []

    def work(self) -> None:
        """Kill and go on, run after run."""
        while self.counts["kills"] < self.kills:
            self.counts["runs"] += 1
            name = f"run-{self.counts['runs']:03}"
            if self._until_finished(name):
                self._compare(name)
            shutil.rmtree(self.bench.folder / name, ignore_errors=True)
            if self.rng.random() < 0.5:
                shutil.rmtree(self.bench.cache, ignore_errors=True)
            print(f"{self.bench.name}: {dict(self.counts)}", file=sys.stderr, flush=True)

    def _until_finished(self, name: str) -> bool:
        """Start a run again and again, killing it most times; False where it cannot be gone on with."""
        while True:
            kill = self._choose() if self.counts["kills"] < self.kills else None
            before = self.bench.checkpoints(name)
            if kill and kill.moment == "cache":
                shutil.rmtree(self.bench.cache, ignore_errors=True)  # so that it is built again
            attempt = self.bench.attempt(name, kill, self.rng.random() < self.by_command, self.rng)
            after = self.bench.checkpoints(name)
            if kill and attempt.killed:
                self.counts["kills"] += 1
                self.moments[kill.moment] += 1
                self.signals[kill.signal.name] += 1
            if before and not any(step >= before[-1] for step in after):
                self._fault("lost", name, f"checkpoints {before} became {after}")
            if "Traceback" in attempt.output:
                self._fault("tracebacks", name, attempt.output[-1500:])
            if attempt.orphans:
                self._fault("orphans", name, f"{attempt.orphans} processes outlived a killed command")
            if attempt.code == 0:
                return True
            if not attempt.killed:
                self._fault("refused", name, f"exit code {attempt.code}: {attempt.output[-800:]}")
                return False
            self.counts["resumed"] += 1

    def _choose(self) -> Kill:
        """A random moment and signal; SIGKILL most often."""
        moment = self.rng.choice(self.bench.moments)
        number = SIGNALS[0] if self.rng.random() < 0.8 else self.rng.choice(SIGNALS[1:])
        soon = moment == "cache" or (moment != "any" and self.rng.random() < 0.5)
        seconds = 0.0 if soon else self.rng.uniform(0, 0.8 * self.bench.seconds)
        delay = self.rng.choice([0, 0, 0.001, 0.003, 0.01])
        # Ctrl-C in a terminal reaches the command alone, which puts its children into a group of their own.
        family = number != signal.SIGINT and self.rng.random() < 0.5
        return Kill(moment, number, seconds, delay, family)

    def _compare(self, name: str) -> None:
        different = differences(self.bench.reference, self.bench.result(name))
        if different:
            self._fault("different", name, "; ".join(different))
        leftovers = self.bench.leftovers(name)
        if leftovers:
            self._fault("leftovers", name, ", ".join(leftovers))

    def _fault(self, kind: str, name: str, words: str) -> None:
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {self.bench.name} {name}: {words}")

    def figures(self) -> dict[str, Any]:
        """The counts, with a zero for each fault that never happened."""
        kinds = ("kills", "runs", "resumed", "lost", "different", "leftovers", "refused", "tracebacks", "orphans")
        return {kind: self.counts[kind] for kind in kinds} | {"moments": self.moments, "signals": self.signals}


def main() -> int:
    """Kill, print the figures as JSON, and return 1 where a run was lost, was different or left something."""
    options = _options()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    figures, faults = {}, []
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for name in options.recipes:
            rng = random.Random(f"{options.seed} {name}")
            share = SHARES[name] / sum(SHARES[other] for other in options.recipes)
            bench = Bench(Path(folder) / name, name, **RECIPES[name])
            killer = Killer(bench, max(1, round(options.kills * share)), rng, options.by_command)
            killer.work()
            figures[name] = killer.figures()
            faults += killer.faults
    print(json.dumps({"seed": options.seed, "recipes": figures, "faults": faults}, indent=1))
    return bool(faults)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--by-command", type=float, default=0.1, help="share of trainings that `llmtune run` starts")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
