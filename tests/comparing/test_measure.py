"""What a comparison takes from the log of a training."""

import pytest
import torch

from llmtune.comparing.entrants.measure import peak_bytes
from llmtune.estimate import measured
from llmtune.estimate.measured import MemoryWatch
from llmtune.machine.peak import Peak
from llmtune.run_log import Record


def test_peak_of_an_arm_is_what_its_log_sets_beside_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([Peak(resident=900), Peak(resident=1_500)])
    monkeypatch.setattr(measured, "resident_bytes", lambda: 700)
    monkeypatch.setattr(measured, "peak", lambda device: next(held))
    watch = MemoryWatch(torch.device("cpu"))
    watch.expect([300, 900], [1, 2])
    log: list[Record] = [record for step in (1, 2) if (record := watch.at(step))]
    assert [record["predicted"] for record in log] == [300, 900]
    assert peak_bytes(log) == 800
    assert peak_bytes([{"step": 1, "memory": "on a card", "allocated": 600, "reserved": 900}]) == 600
    assert peak_bytes([{"step": 1, "loss": 1.0}]) is None
