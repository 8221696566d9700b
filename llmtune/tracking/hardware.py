"""What a training ran on, for how long, and the energy that it took: a record of the log at the end of each part."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from llmtune.machine import processes
from llmtune.machine.energy import EnergyMeter, device_kind, device_name, energy_meter
from llmtune.numbers import duration
from llmtune.run_log import Record

JOULES_PER_KWH = 3.6e6


class HardwareRecorder(TrainerCallback):
    """Measures a training from its first step to its last, in every process, and records the whole of it."""

    def __init__(self, record: Callable[[Record], None], device: torch.device) -> None:
        self._record, self._device = record, device
        self._meter, self._began, self._first = EnergyMeter({}), 0.0, 0

    def on_train_begin(self, args: object, state: TrainerState, *_: object, **named: object) -> None:
        self._meter = energy_meter(self._device, processes.is_first_here())
        self._began, self._first = time.monotonic(), state.global_step
        self._meter.start()

    def on_train_end(self, args: object, state: TrainerState, *_: object, **named: object) -> None:
        if state.global_step == self._first:
            return  # nothing was trained
        kind = device_kind(self._device)
        counted = kind == "GPU" or processes.is_first_here()
        own = {
            "device": device_name(self._device) if counted else None,
            "counts": processes.is_first_here(),
            "joules": self._meter.stop(),
        }
        facts = combine(processes.gather(own), kind)
        facts = {"from": self._first, "seconds": round(time.monotonic() - self._began, 3), **facts}
        self._record({"step": state.global_step, "hardware": in_words(facts), "measured": facts})


def combine(parts: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Devices with their number, and joules by kind, of all processes on devices of a kind.

    A kind that one of them did not measure is left out.
    """
    devices = Counter(part["device"] for part in parts if part["device"])
    groups = {"GPU": parts if kind == "GPU" else [], "CPU": [part for part in parts if part["counts"]]}
    joules = {
        name: sum(part["joules"][name] for part in group)
        for name, group in groups.items()
        if group and all(name in part["joules"] for part in group)
    }
    return {"devices": dict(devices), "kind": kind, "joules": joules}


def in_words(facts: dict[str, Any]) -> str:
    """Facts of hardware as one line: devices, time, and energy where it was measured."""
    names = ", ".join(f"{count} x {name}" for name, count in facts["devices"].items())
    joules = facts["joules"]
    energy = f"{sum(joules.values()) / JOULES_PER_KWH:.3g} kWh ({' and '.join(joules)})" if joules else "not measured"
    return f"hardware: {names}, {duration(facts['seconds'])}; energy: {energy}"
