"""The results of one machine, in a file that is complete after every run: an interrupted bench goes on where it was."""

import functools
import importlib.metadata
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.cells import Planned
from llmtune.files import digest_of, digest_of_files, read_json, write_json
from llmtune.machine.cores import count_cores

ROOT = Path(__file__).parents[1]
CPUINFO = Path("/proc/cpuinfo")
FOLDER = ROOT / "benchmarks" / "results"
_MEASURING = ("arms.py", "bases.py", "contest.py", "process.py", "random_weights.py", "rows.py")
"""What starts the tools here, gives them their work and measures them."""
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")


class Store:
    """The runs of a machine. All runs of a cell are of the same code, libraries and settings: others make room.

    Raises SystemExit for a file with runs of another machine.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        content = read_json(file) if file.exists() else {}
        if content and not same_machine(content["machine"], machine()):
            raise SystemExit(f"{file}: results of {describe(content['machine'])}; this is {describe(machine())}")
        self.runs: list[dict[str, Any]] = content.get("runs", [])

    def done(self, planned: Planned, group: dict[str, Any], version: str) -> bool:
        """Whether a run ended well before, on the same code, libraries and settings."""
        key = key_of(planned, group, version)
        return any(run["key"] == key and "error" not in run for run in self.runs)

    def add(self, planned: Planned, group: dict[str, Any], version: str, figures: dict[str, Any]) -> dict[str, Any]:
        """Add a run's figures, and write the file; gives the run as it is kept."""
        cell = planned.cell
        place = {"size": cell.size, "rows": cell.rows, "arm": cell.arm, "tool": planned.tool, "repeat": planned.repeat}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        when = {"date": now, "commit": commit(), **({"version": version} if version else {})}
        run = {**place, "key": key_of(planned, group, version), "group": digest_of(group)[:12], **when, **figures}
        run["settings"] = {key: value for key, value in group.items() if key not in ("code", "versions")}
        self.runs = [other for other in self.runs if _stays(other, run)] + [run]
        write_json(self.file, {"machine": machine(), "versions": group["versions"], "runs": self.runs})
        return run


def _stays(other: dict[str, Any], run: dict[str, Any]) -> bool:
    if any(other[key] != run[key] for key in ("size", "rows", "arm")):
        return True
    return other["group"] == run["group"] and any(other[key] != run[key] for key in ("tool", "repeat"))


def key_of(planned: Planned, group: dict[str, Any], version: str) -> str:
    """The key of a run: whatever decides its figures, beside the machine."""
    cell = planned.cell
    return digest_of([cell.name, planned.tool, planned.repeat, version, group])[:12]


def group_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a cell have in common: the code of llmtune and of the tools' parts here, libraries, settings."""
    return {**settings, "code": code(), "versions": versions()}


@functools.cache
def code() -> str:
    """The digest of the code that is measured, and of what starts and measures it."""
    folders = [digest_of_files(ROOT / name, "*.py") for name in ("llmtune", "benchmarks/tools")]
    return digest_of([*folders, *((ROOT / "benchmarks" / name).read_text() for name in _MEASURING)])[:12]


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the libraries that train."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


@functools.cache
def commit() -> str:
    """The commit of this checkout, and whether the code differs from it; unknown outside of one."""
    words = ["git", "-C", str(ROOT)]
    where = ("--", "llmtune", "benchmarks/*.py")
    try:
        head = subprocess.run([*words, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*words, "diff", "--quiet", "HEAD", *where], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed.returncode else "")


def machine() -> dict[str, Any]:
    """What decides speed on this machine, without its name."""
    return {**processor(), "cores": count_cores(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}


def processor() -> dict[str, Any]:
    """Return the processor's name, and its family and model: on rented machines several generations share a name."""
    first = CPUINFO.read_text().split("\n\n")[0] if CPUINFO.exists() else ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name") or platform.processor() or "cpu"
    return {"cpu": name, "family": facts.get("cpu family", ""), "model": facts.get("model", "")}


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two machines have the same processor and as many cores; one whose family is not recorded equals none."""
    return all(one.get(key) == other.get(key) for key in ("cpu", "family", "model", "cores"))


def describe(facts: dict[str, Any]) -> str:
    """A machine's processor and cores in words."""
    if "family" not in facts:
        generation = " (family not recorded)"
    else:
        generation = f" (family {facts['family']}, model {facts['model']})" if facts["family"] else ""
    return f"{facts['cpu']}{generation}, {facts['cores']} cores"


def default_file() -> Path:
    """The file of this machine's results, named after its processor and cores."""
    facts = machine()
    words = f"{facts['cpu']} {facts['family']} {facts['model']} {facts['cores']} cores"
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}.json"
