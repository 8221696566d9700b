"""Freed memory stays with the process and compiled kernels are few, unless the user chose otherwise."""

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtune.launch.command import training_environment
from llmtune.machine import memory
from llmtune.machine.device import free_bytes
from llmtune.machine.memory import (
    PRIMITIVES,
    UNCACHED,
    bound_primitive_cache,
    free_memory,
    machine_memory,
    release_pages,
)

FREED = """
import os, sys
from llmtune.machine.memory import keep_freed
kept = keep_freed() if sys.argv[1] == "kept" else None
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
taken = [bytearray(2**22) for _ in range(16)]
del taken
print(kept, resident() - before > 2**25)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes these options")
@pytest.mark.parametrize(
    ("how", "environment", "printed"),
    [
        ("kept", {}, "True True"),
        ("plain", {}, "None False"),
        ("kept", {"MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_MMAP_THRESHOLD_": "1048576"}, "False False"),
        ("kept", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1048576"}, "False False"),
        ("kept", {"GLIBC_TUNABLES": UNCACHED}, "True True"),
    ],
)
def test_keeps_freed_memory_unless_the_user_chose(how: str, environment: dict[str, str], printed: str) -> None:
    command = [sys.executable, "-c", FREED, how]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True)
    assert done.stdout.strip() == printed, done.stderr


SMALL = """
import ctypes
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "o", "s", "h", "hb", "us", "fs", "used", "free", "top")]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
before = libc.mallinfo2().used
places = [libc.malloc(1000) for _ in range(6)]
taken = libc.mallinfo2().used
for place in places:
    libc.free(place)
print((taken - before) // 6000, (libc.mallinfo2().used - before) // 1000)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc from 2.33 on reports used memory")
def test_training_reuses_small_freed_pieces_at_once() -> None:
    child = training_environment(1, 2)
    done = subprocess.run([sys.executable, "-c", SMALL], env=child, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0"], done.stderr


def test_respects_a_users_bound_on_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1000")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    bound_primitive_cache()
    assert os.environ["LRU_CACHE_CAPACITY"] == "1000"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == PRIMITIVES["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes pages back")
def test_releases_a_tensors_own_pages_and_no_others() -> None:
    pages = torch.ones(8, 2**16)
    middle = pages[2:6]
    release_pages(middle)
    size = mmap.PAGESIZE // 4
    assert not middle.flatten()[size:-size].any()
    assert pages[:2].all()
    assert pages[6:].all()
    transposed = pages[6:].T
    release_pages(transposed)
    assert transposed.all()


def test_container_memory_that_only_caches_files_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    limit = tmp_path / "memory.max"
    limit.write_text("1000")
    (tmp_path / "memory.current").write_text("900")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\nactive_file 50\n")
    assert free_memory() == free_bytes(torch.device("cpu")) == 450
    assert machine_memory().endswith("and this container may use 1.0 kB")
    limit.write_text("max")
    assert free_memory() > 10**6
    assert "container" not in machine_memory()


GROWN = """
import os, sys, torch
from llmtune.machine.memory import bound_primitive_cache
if sys.argv[1] == "few":
    bound_primitive_cache()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
left, right = torch.randn(2000, 64).bfloat16(), torch.randn(64, 64).bfloat16()
for tokens in range(400, 500):
    left[:tokens] @ right
before = resident()
for tokens in range(500, 1500):
    left[:tokens] @ right
print(resident() - before, os.environ["LRU_CACHE_CAPACITY"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN compiles no bf16 kernels here")
def test_bounds_memory_per_row_length() -> None:
    def run(how: str, **environment: str) -> tuple[int, str]:
        command = [sys.executable, "-c", GROWN, how]
        done = subprocess.run(
            command, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, check=True
        )
        grown, capacity = done.stdout.split()
        return int(grown), capacity

    grown, capacity = run("few")
    plain, _ = run("plain", LRU_CACHE_CAPACITY="1024")
    assert capacity == "64"
    assert grown < plain / 2
