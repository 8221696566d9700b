"""Memory that is freed stays with the process, unless the user has said what the allocator should do."""

import platform
import subprocess
import sys

import pytest

FREED = """
import os, sys
from llmtune.allocator import keep_freed
said = keep_freed() if sys.argv[1] == "kept" else None
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
taken = [bytearray(2**22) for _ in range(16)]
del taken
print(said, resident() - before > 2**25)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes these options")
@pytest.mark.parametrize(
    ("how", "environment", "printed"),
    [
        ("kept", {}, "True True"),
        ("plain", {}, "None False"),
        ("kept", {"MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_MMAP_THRESHOLD_": "1048576"}, "False False"),
        ("kept", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1048576"}, "False False"),
    ],
)
def test_freed_memory_is_kept_unless_the_user_chose(how: str, environment: dict[str, str], printed: str) -> None:
    command = [sys.executable, "-c", FREED, how]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True)
    assert done.stdout.strip() == printed, done.stderr
