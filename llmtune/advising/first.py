"""The method that `llmtune init` writes: by rows, base and machine alone, before anything heavy is imported."""

from dataclasses import dataclass

from llmtune.advising.choice import Choice, choose
from llmtune.advising.facts import Facts
from llmtune.advising.headers import parameters_of
from llmtune.advising.recall import Remembered, like
from llmtune.advising.rules import applying, load_rules
from llmtune.machine.gpus import count_gpus
from llmtune.machine.memory import free_memory

CANDIDATES = ("lora", "frozen", "full", "qlora")
"""The methods that init chooses among: the others have to be asked for."""
_LORA_BYTES = 3.0
"""Bytes of memory that LoRA takes for each parameter of the base, about: 16-bit weights, and what a pass keeps."""


@dataclass(frozen=True)
class FirstAdvice:
    """What init recommends, and what it tells beside it."""

    choice: Choice
    before: list[Remembered]
    """What was measured on like data, the newest first."""

    @property
    def lines(self) -> list[str]:
        """What is told in a terminal."""
        return [f"advised: {self.choice.arm}: {self.choice.reason}", *(one.words for one in self.before[:1])]


def first_advice(base: str, rows: int, kind: str, labels: int, epochs: int) -> FirstAdvice:
    """The method for such rows on this machine."""
    parameters = parameters_of(base)
    gpu = count_gpus() > 0
    facts = Facts(
        rows=rows,
        kind=kind,
        labels=labels,
        parameters=parameters,
        device="gpu" if gpu else "cpu",
        epochs=epochs,
        lora_fits=None if parameters is None else _LORA_BYTES * parameters <= _free(gpu),
    )
    rules = applying(load_rules(), facts)
    before = like(base, parameters, kind, rows)
    choice = choose(CANDIDATES, rules, before) or Choice(CANDIDATES[0], "")
    return FirstAdvice(choice, before)


def _free(gpu: bool) -> int:
    """Bytes that are free for a training."""
    if gpu:
        from llmtune.machine.device import free_bytes, run_device

        return free_bytes(run_device())
    return free_memory()
