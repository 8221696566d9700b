"""What the host reads of a device: one reading a step, and every error at the step that it is about."""

import re
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from llmtune.data.batches.collate import Collator
from llmtune.errors import TrainingError
from llmtune.kernels import readings
from llmtune.kernels.readings import Readings
from tests.support import training
from tests.support.cached import GRADUAL, LORA
from tests.support.gpu_ways import answer_for_gpu
from tests.support.training import METHODS, fit

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}
"""Operations whose result, or its size, the host needs at once."""
METHODS_THAT_READ = {"tolist", "numpy", "cpu", "__array__", "tensor", "from_numpy"}
"""Functions that read a tensor, or make one of the host's numbers, for whose copy to a device the host waits."""


class Reads(TrainerCallback):
    """Counts, by line of code, what is read between the beginnings of two steps, and walks over all parameters."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self.walks: list[int] = []
        self.paused = False

    def on_step_begin(self, *_: object, **named: object) -> None:
        self.steps.append(Counter())
        self.walks.append(0)

    def add(self, name: str) -> None:
        """Count one read, unless the host's own tensors are worked on."""
        frames = traceback.extract_stack()
        # Joined rows are computed on the host, of lengths that it knows, and copied without waiting.
        on_host = any(Path(f.filename).name == "rows.py" and f.name == "__init__" for f in frames)
        if self.steps and not self.paused and not on_host:
            lines = [f"{f.filename}:{f.lineno}" for f in frames if not re.search(r"/(tests|torch)/", f.filename)]
            self.steps[-1][f"{name} {lines[-1] if lines else ''}"] += 1

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, made on the host."""
        self.paused = True
        batch = Collator(0)(rows)
        self.paused = False
        return batch


@contextmanager
def counting(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have every read and every walk over all parameters counted."""

    class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            by_mask = func.overloadpacket.__name__ == "index" and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            if func.overloadpacket.__name__ in READS or by_mask:
                reads.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    class Methods(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in METHODS_THAT_READ:
                reads.add(func.__name__)
            return func(*args, **(kwargs or {}))

    named_parameters = nn.Module.named_parameters

    def walk(module: nn.Module, *arguments: Any, **named: Any) -> Any:
        if reads.walks and hasattr(module, "base_model"):
            reads.walks[-1] += 1
        return named_parameters(module, *arguments, **named)

    monkeypatch.setattr(nn.Module, "named_parameters", walk)
    with Operations(), Methods():  # type: ignore[no-untyped-call]
        yield


@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
@pytest.mark.slow
def test_a_step_reads_the_device_once(tmp_path: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_for_gpu(monkeypatch)
    reads, log = Reads(), list[dict[str, Any]]()
    method = {"kind": "full", "lr": 0.01, "adapter": adapter}
    more: dict[str, Any] = {"callbacks": [reads], "record": log.append, "gradient_accumulation_steps": 2}
    trainer = training.trainer(tmp_path, method, steps=6, **more)
    trainer.data_collator = reads.collate
    with counting(reads, monkeypatch):
        trainer.train()
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert max(entry["padding"] for entry in log) == 0, "rows are not joined"
    # The first step proves that rows may be joined and finds out what the model does with its head's outputs;
    # UpdateCheck looks at the third.
    for step in (1, 3, 4):
        assert sum(reads.steps[step].values()) <= 1, reads.steps[step]
    assert max(reads.walks[1:2] + reads.walks[3:5]) <= 2  # Trainer's, to clip gradients and to drop them


def test_a_late_log_is_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"eval_data": training.rows(4, seed=5), "eval_strategy": "steps", "eval_steps": 2, "steps": 5}
    prompt = fit(tmp_path, METHODS["full"], **more)[2]
    monkeypatch.setattr(readings, "reads_late", lambda device: True)
    late = fit(tmp_path, METHODS["full"], **more)[2]
    assert [entry["step"] for entry in prompt] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert late == prompt


def test_a_stage_ends_with_its_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "reads_late", lambda device: True)
    read_at: dict[int, int] = {}

    def record(entry: dict[str, Any]) -> None:
        read_at[entry["step"]] = trainer.state.global_step

    trainer = training.trainer(tmp_path, GRADUAL, steps=6, record=record)
    trainer.train()
    assert trainer.schedule.ends == [2, 4, 6]
    assert read_at == {1: 2, 2: 2, 3: 4, 4: 4, 5: 6, 6: 6}


def test_a_late_loss_that_is_not_finite_ends_training_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoil(TrainerCallback):
        """Makes the second step's loss no number."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **named: Any) -> None:
            if state.global_step == 1:
                with torch.no_grad():
                    model.model.norm.weight.fill_(float("nan"))

    monkeypatch.setattr(readings, "reads_late", lambda device: True)
    for every, kept in ((1, ["step-000001"]), (3, [])):
        out = tmp_path / str(every)
        save: dict[str, Any] = {"save_strategy": "steps", "save_steps": every}
        with pytest.raises(TrainingError, match="loss is nan at step 2; the last checkpoint is kept"):
            training.trainer(out, METHODS["full"], callbacks=[Spoil()], **save).train()
        assert sorted(path.name for path in out.glob("step-*")) == kept


def test_readings_come_in_order_and_the_latest_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "reads_late", lambda device: True)
    waiting, taken = Readings(torch.device("cpu")), list[list[float]]()
    for number in range(3):
        waiting.put(torch.tensor([float(number)]), taken.append)
        waiting.settle(False)
    assert taken == [[0.0], [1.0]]
    waiting.settle(True)
    assert taken == [[0.0], [1.0], [2.0]]
