"""Hardware and emissions on a card: from what the training's parts recorded, and never from a part of it alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.publishing.parts.hardware import footprint
from llmtune.run import Run

H100 = {"devices": {"NVIDIA H100": 2}, "kind": "GPU"}
CPU = {"devices": {"AMD EPYC": 1}, "kind": "CPU"}
KWH = 3.6e6


def part(start: int, end: int, joules: dict[str, float], facts: dict[str, Any] = H100) -> dict[str, Any]:
    """The record of a part of a training that took a quarter of an hour."""
    return {
        "step": end,
        "hardware": "in words",
        "measured": {**facts, "from": start, "seconds": 900.0, "joules": joules},
    }


def step(number: int, seconds: float = 0.0) -> dict[str, Any]:
    """The record of a step."""
    return {"step": number, "loss": 1.0, "seconds": seconds}


@pytest.mark.parametrize(
    ("log", "words", "grams"),
    [
        (
            [step(8), part(0, 8, {"GPU": KWH, "CPU": KWH / 4})],
            "Trained on 2 x NVIDIA H100 for 15:00. Measured energy: 1 kWh by the GPUs and 0.25 kWh by the CPUs, other "
            "programs included. At 400 g of CO2 per kWh that is 500 g of CO2.",
            500.0,
        ),
        (
            [step(4), part(0, 4, {"GPU": KWH}), step(8), part(4, 8, {"GPU": KWH, "CPU": 1.0})],
            "Trained on 2 x NVIDIA H100 for 30:00. Measured energy: 2 kWh by the GPUs; that of the rest of the machine "
            "was not measured. At 400 g of CO2 per kWh that is 800 g of CO2.",
            800.0,
        ),
        (  # the part from 0 to 4 was killed before it could record what it took
            [step(4, 600.0), step(8, 2700.0), part(4, 8, {"GPU": KWH})],
            "Trained on 2 x NVIDIA H100 for 45:00. Its energy was not measured.",
            None,
        ),
        (  # killed after a part that ended well
            [part(0, 4, {"CPU": KWH}, CPU), step(8, 1800.0)],
            "Trained on 1 x AMD EPYC for 30:00. Its energy was not measured.",
            None,
        ),
        (  # the GPUs that trained were not measured: the CPUs' share is no footprint
            [step(8), part(0, 8, {"CPU": KWH})],
            "Trained on 2 x NVIDIA H100 for 15:00. Its energy was not measured.",
            None,
        ),
        (
            [step(8), part(0, 8, {"CPU": KWH}, CPU)],
            "Trained on 1 x AMD EPYC for 15:00. Measured energy: 1 kWh by the CPUs, other programs included. At 400 g "
            "of CO2 per kWh that is 400 g of CO2.",
            400.0,
        ),
    ],
)
def test_tells_energy_and_emissions_of_a_whole_training_alone(
    tmp_path: Path, log: list[dict[str, Any]], words: str, grams: float | None
) -> None:
    run = Run(tmp_path)
    run.log_file.write_text("".join(json.dumps(record) + "\n" for record in log))
    told = footprint(run)
    assert told is not None
    assert told.in_words(400.0) == words
    metadata = told.metadata(400.0)
    assert (metadata and metadata["emissions"]) == grams
    assert told.metadata(None) is None
    assert "CO2" not in told.in_words(None)


def test_a_run_that_recorded_no_hardware_tells_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log_file.write_text(json.dumps(step(1)) + "\n")
    assert footprint(run) is None
