"""The energy that a process's GPU and its machine's CPUs used, by the counters of NVML and of RAPL, and their names."""

import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

POWERCAP = Path("/sys/class/powercap")
_CPUINFO = Path("/proc/cpuinfo")
_ZONES = ("package", "dram")
"""How the names of the zones begin that together are what CPUs and memory use; others are parts of them."""
_POLL_SECONDS = 30.0
"""The counter of a busy CPU begins anew after a few minutes."""

Read = Callable[[], float]


@dataclass(frozen=True)
class Counter:
    """A counter of joules, which begins anew at `limit` where it has one."""

    read: Read
    limit: float | None = None

    def between(self, before: float, after: float) -> float:
        """Joules between two readings."""
        return (after - before) % self.limit if self.limit else after - before


class EnergyMeter:
    """Adds up what counters count between `start` and `stop`; a kind without a readable counter is not measured."""

    def __init__(self, counters: dict[str, list[Counter]]) -> None:
        self._counters = counters
        self._sums: dict[str, float] = {}
        self._last: dict[str, list[float]] = {}
        self._lock, self._over = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Begin to count, in a thread that reads the counters before they begin anew."""
        self._last = {kind: values for kind, counters in self._counters.items() if (values := _values(counters))}
        self._sums = dict.fromkeys(self._last, 0.0)
        if self._last:
            threading.Thread(target=self._poll, daemon=True).start()

    def stop(self) -> dict[str, float]:
        """Joules since `start`, by kind: GPU, CPU; without those that were not readable all the time."""
        self._over.set()
        self._add()
        return self._sums

    def _poll(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            self._add()

    def _add(self) -> None:
        with self._lock:
            for kind in list(self._sums):
                before, now = self._last[kind], _values(self._counters[kind])
                if not now:
                    del self._sums[kind]
                    continue
                pairs = zip(self._counters[kind], before, now, strict=True)
                self._sums[kind] += sum(counter.between(first, second) for counter, first, second in pairs)
                self._last[kind] = now


def _values(counters: list[Counter]) -> list[float]:
    """The counters' values; none where one cannot be read."""
    try:
        return [counter.read() for counter in counters]
    except Exception:  # a driver's own errors; energy is worth no end of a training
        return []


def energy_meter(device: "torch.device", with_cpus: bool) -> EnergyMeter:
    """The meter of one process: its GPU and, for one process of each machine, the CPUs."""
    counters = {"GPU": gpu_counters(device), "CPU": cpu_counters() if with_cpus else []}
    return EnergyMeter({kind: readable for kind, readable in counters.items() if readable})


def cpu_counters(folder: Path = POWERCAP) -> list[Counter]:
    """The counters of this machine's CPUs and memory, which also count what other programs use."""
    zones = [file.parent for file in sorted(folder.glob("*/energy_uj"))]
    return [_zone(zone) for zone in zones if _text(zone / "name").startswith(_ZONES)]


def _zone(zone: Path) -> Counter:
    limit = _text(zone / "max_energy_range_uj")
    return Counter(lambda: int((zone / "energy_uj").read_text()) / 1e6, int(limit) / 1e6 if limit.isdigit() else None)


def gpu_counters(device: "torch.device") -> list[Counter]:
    """The counter of a GPU of NVIDIA, which the package nvidia-ml-py reads; none without it or for other devices."""
    if device.type != "cuda":
        return []
    import torch

    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, a GPU that does not count
        return []
    return [Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]


def device_kind(device: "torch.device") -> Literal["GPU", "CPU"]:
    """What a device is."""
    return "GPU" if device.type == "cuda" else "CPU"


def device_name(device: "torch.device") -> str:
    """The name of a GPU or, for training on CPUs, of this machine's CPU."""
    if device.type != "cuda":
        return cpu_name()
    import torch

    return str(torch.cuda.get_device_name(device))


def cpu_name(file: Path = _CPUINFO) -> str:
    """The CPU's name as its maker writes it, or the architecture where the system does not know one."""
    names = (line.partition(":")[2].strip() for line in _text(file).splitlines() if line.startswith("model name"))
    return next(filter(None, names), f"{platform.machine() or 'unknown'} CPU")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
