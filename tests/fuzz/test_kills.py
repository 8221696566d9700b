"""Trainings that are killed at random moments and gone on with end as one that nothing stopped."""

import json
import subprocess
import sys

import pytest

from tests.fuzz.killed import Result, differences
from tests.support import ROOT


@pytest.mark.slow
def test_killed_trainings_end_as_one_that_nothing_stopped() -> None:
    # Trainings are forks: in the process of pytest, which has threads, they might never end.
    command = [sys.executable, "-m", "tests.fuzz.kills", "--kills", "4", "--seed", "1", "--by-command", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    counts = json.loads(ended.stdout)["recipes"].values()
    assert sum(one["kills"] for one in counts) >= 4
    assert sum(one["signals"].get("SIGKILL", 0) for one in counts) >= 2
    assert [one[fault] for one in counts for fault in ("lost", "different", "leftovers", "refused")] == [0] * 12


def test_sees_what_differs_between_two_trainings() -> None:
    result = Result({"trained.safetensors": "a"}, [(1, 0.5), (2, 0.25)])
    assert differences(result, result) == []
    assert differences(result, Result({"trained.safetensors": "b"}, result.losses)) == ["trained.safetensors"]
    assert differences(result, Result({**result.delta, ".tmpX": "c"}, result.losses)) == [".tmpX"]
    assert differences(result, Result(result.delta, [(1, 0.5), (2, 0.26)])) == ["loss of step 2"]
    assert differences(result, Result(result.delta, [(1, 0.5), (1, 0.5), (2, 0.25)])) == [
        "the log has the steps [1, 1, 2]"
    ]
