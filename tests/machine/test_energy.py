"""Energy by counters: RAPL's files, NVML's driver, counters that begin anew, and those that nobody may read."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtune.machine import energy
from llmtune.machine.energy import EnergyMeter, cpu_counters, cpu_name, gpu_counters
from llmtune.tracking.hardware import combine, in_words

CPU = torch.device("cpu")


def zone(folder: Path, name: str, kind: str, microjoules: int, limit: int = 1000_000_000) -> Path:
    """Write a zone as the kernel shows it."""
    (folder / name).mkdir(exist_ok=True)
    for file, value in (("name", kind), ("energy_uj", microjoules), ("max_energy_range_uj", limit)):
        (folder / name / file).write_text(f"{value}\n")
    return folder / name / "energy_uj"


def test_adds_packages_and_memory_and_follows_a_counter_that_begins_anew(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:1", "psys", 7)
    meter = EnergyMeter({"CPU": cpu_counters(tmp_path)})
    meter.start()
    package.write_text("4000000")
    memory.write_text("8000000")
    assert meter.stop() == {"CPU": pytest.approx(10 + 4 + 3)}


def test_what_cannot_be_read_all_the_time_is_not_measured(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    assert cpu_counters(tmp_path / "none") == []
    meter = EnergyMeter({"CPU": cpu_counters(tmp_path)})
    meter.start()
    package.unlink()
    assert meter.stop() == {}
    unreadable = EnergyMeter({"CPU": cpu_counters(tmp_path)})
    unreadable.start()
    assert unreadable.stop() == {}


def test_reads_a_gpu_by_its_identity_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[str] = []
    readings = iter([1_000, 2_000, 9_500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handles.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    card = torch.device("cuda", 0)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_counters(card) == []
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    assert gpu_counters(CPU) == []
    meter = EnergyMeter({"GPU": gpu_counters(card)})
    meter.start()
    assert meter.stop() == {"GPU": 7.5}
    assert handles == ["GPU-12ab"]


def test_energy_of_all_processes_counts_each_machine_once(tmp_path: Path) -> None:
    first = {"device": "H100", "counts": True, "joules": {"GPU": 100.0, "CPU": 10.0}}
    second = {"device": "H100", "counts": False, "joules": {"GPU": 100.0}}
    facts = combine([first, second], "GPU")
    assert facts == {"devices": {"H100": 2}, "kind": "GPU", "joules": {"GPU": 200.0, "CPU": 10.0}}
    blind = combine([first, {**second, "joules": {}}], "GPU")
    assert blind["joules"] == {"CPU": 10.0}
    assert in_words({**combine([{**first, "joules": {}}], "CPU"), "seconds": 65}) == (
        "hardware: 1 x H100, 1:05; energy: not measured"
    )
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: AMD EPYC 7B13\nmodel name\t: AMD EPYC 7B13\n")
    assert cpu_name(tmp_path / "cpuinfo") == "AMD EPYC 7B13"
    assert energy.cpu_name(tmp_path / "none").endswith(" CPU")
