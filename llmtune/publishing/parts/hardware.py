"""What a training ran on and what it emitted, from the records that it left in the log; never from a guess."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.numbers import duration
from llmtune.run import Run
from llmtune.run_log import Record, read_log
from llmtune.tracking.hardware import JOULES_PER_KWH

SOURCE = "measured by llmtune: energy by NVML and RAPL counters, times the grid's carbon intensity as its user gave it"


@dataclass(frozen=True)
class Footprint:
    """Devices with their number, hours of training, and the energy of all of it in kWh, by what was measured."""

    devices: Mapping[str, int]
    device: str
    """GPU or CPU: what the devices are."""
    seconds: float
    kwh: Mapping[str, float]
    """By kind of device; empty where a part of the training was not measured."""

    @property
    def device_words(self) -> str:
        """The devices: 2 x NVIDIA H100."""
        return ", ".join(f"{count} x {name}" for name, count in self.devices.items())

    def emissions(self, grid: float | None) -> float | None:
        """Grams of CO2, by the grid's grams per kWh; None without them or without measured energy."""
        return sum(self.kwh.values()) * grid if self.kwh and grid else None

    def metadata(self, grid: float | None) -> dict[str, Any] | None:
        """The Hub's co2_eq_emissions; None where they are not known."""
        grams = self.emissions(grid)
        if grams is None:
            return None
        values = {"source": SOURCE, "training_type": "fine-tuning", "hardware_used": self.device_words}
        return {"emissions": float(f"{grams:.3g}"), **values}

    def in_words(self, grid: float | None) -> str:
        """Return the card's sentences on hardware, hours, energy and emissions."""
        text = f"Trained on {self.device_words} for {duration(self.seconds)}."
        if not self.kwh:
            return f"{text} Its energy was not measured."
        parts = " and ".join(f"{kwh:.3g} kWh by the {kind}s" for kind, kwh in self.kwh.items())
        text += f" Measured energy: {parts}{self._missing()}."
        grams = self.emissions(grid)
        if grams is not None:
            text += f" At {grid:g} g of CO2 per kWh that is {grams:.3g} g of CO2."
        return text

    def _missing(self) -> str:
        """What the energy leaves out, in words."""
        if self.device == "GPU" and "CPU" not in self.kwh:
            return "; that of the rest of the machine was not measured"
        if self.device == "GPU" and "GPU" not in self.kwh:
            return "; that of the GPUs was not measured"
        return ", other programs included"


def footprint(run: Run) -> Footprint | None:
    """Add up the parts of a training that was resumed; None where none recorded its hardware.

    Energy counts only where the parts follow on one another from the first step to the last, and the devices' own
    energy was measured in each.
    """
    log = read_log(run.log_file)
    parts = [record for record in log if isinstance(record.get("measured"), dict)]
    if not parts:
        return None
    last = parts[-1]["measured"]
    steps = [record for record in log if "loss" in record]
    seconds = sum(part["measured"]["seconds"] for part in parts)
    if not _complete(parts, steps):
        seconds = max(seconds, steps[-1].get("seconds", 0.0) if steps else 0.0)
    return Footprint(last["devices"], last["kind"], seconds, _kwh(parts) if _complete(parts, steps) else {})


def _complete(parts: list[Record], steps: list[Record]) -> bool:
    """Whether each part begins where the one before it ended, from the first step to the last."""
    ends = [0, *(part["step"] for part in parts)]
    follows = all(part["measured"]["from"] == end for part, end in zip(parts, ends, strict=False))
    return follows and (not steps or steps[-1]["step"] <= ends[-1])


def _kwh(parts: list[Record]) -> dict[str, float]:
    """Energy by kind of device that every part measured; none where that of the devices that trained is missing."""
    joules = [part["measured"]["joules"] for part in parts]
    kinds = [kind for kind in ("GPU", "CPU") if all(kind in one for one in joules)]
    own = {part["measured"]["kind"] for part in parts}
    return {kind: sum(one[kind] for one in joules) / JOULES_PER_KWH for kind in kinds} if own <= set(kinds) else {}
