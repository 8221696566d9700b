"""`make gpu-bundle`: one archive of what a machine with Python 3.12, torch for CUDA 13 and common packages lacks."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from benchmarks.gpu.budget import ROOT
from llmtune.numbers import size

PYTHON = "3.12"
GLIBC = (28, 27, 26, 24, 17, 12, 5)
"""The manylinux tags that are tried."""
PACKAGES = (
    "transformers", "trl", "peft", "accelerate", "datasets", "dill", "multiprocess", "pydantic", "pydantic_core",
    "annotated-types", "typing-inspection", "typing_extensions", "huggingface_hub", "httpx2", "httpcore2", "truststore",
    "tokenizers", "safetensors", "fsspec", "filelock", "typer", "bitsandbytes", "datasketch",
)  # fmt: skip
"""Names as in constraints.txt, which holds their versions."""
MORE = ("liger-kernel==0.8.0",)
"""What only the other tools of the bench use."""
NATIVE = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")
"""The libraries of bitsandbytes that are kept, of the fifteen for every CUDA."""
LEFT_OUT = ("*/tests/*", "*/test/*", "*.pyi", "bin/*", "*/scripts/*", "*/templates/*.ipynb")
OUT = ROOT / "build" / "gpu-site.tgz"
LIMIT = 64 * 2**20
FIRST_LINE = (
    "mkdir -p /tmp/site && tar xzf build/gpu-site.tgz -C /tmp/site && export PYTHONPATH=/tmp/site:$PWD && "
    'python3 -c "import benchmarks.gpu.check_imports"'
)
"""What is to be run first on the other machine: it ends early where a package is missing or too old."""


def versions(constraints: str, names: tuple[str, ...] = PACKAGES) -> list[str]:
    """NAME==VERSION of each package by the text of a constraints file; raises KeyError for one that it lacks."""
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", constraints, re.MULTILINE))
    normal = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    return [f"{name}=={normal[re.sub(r'[-_.]+', '-', name).lower()]}" for name in names]


def is_kept(name: str) -> bool:
    """Whether a file of a wheel goes into the archive."""
    path = Path(name)
    if path.suffix == ".so" and path.parts[0] == "bitsandbytes":
        return path.name in NATIVE
    return not any(path.match(pattern) or Path("x", path).match(pattern) for pattern in LEFT_OUT)


def download(requirements: list[str], folder: Path) -> None:
    """Fetch wheels for Linux on x86-64 with the pip that is configured here."""
    platforms = [word for minor in GLIBC for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
    platforms += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, "-d", str(folder), *requirements]
    subprocess.run(words, check=True)


def unpack(wheel: Path, site: Path) -> None:
    """Unpack the files of a wheel that are kept."""
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if not name.endswith("/") and is_kept(name):
                files.extract(name, site)


def pack(site: Path, out: Path) -> int:
    """Write the archive; gives its bytes."""
    with tarfile.open(out, "w:gz", compresslevel=9) as archive:
        for entry in sorted(site.iterdir()):
            archive.add(entry, arcname=entry.name)
    return out.stat().st_size


def main() -> int:
    """Download, trim and pack; prints the size and the line to begin with; 1 where the archive is too large."""
    wheels, site = OUT.parent / "gpu-wheels", OUT.parent / "gpu-site"
    for folder in (wheels, site):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    download([*versions((ROOT / "constraints.txt").read_text()), *MORE], wheels)
    for wheel in sorted(wheels.glob("*.whl")):
        unpack(wheel, site)
    packed = pack(site, OUT)
    for folder in (wheels, site):
        shutil.rmtree(folder)
    print(f"{OUT.relative_to(ROOT)}: {size(packed)}; begin on the other machine, in this folder, with:\n{FIRST_LINE}")
    return int(packed > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
