"""The parts of a prediction: weights, gradients, optimizer states, working memory; and what a run then measured."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import nn

from llmtune import recipe as recipes
from llmtune.estimate.autocast import IN_FP32, LOWERED, MetaAutocast
from llmtune.estimate.live import working_bytes
from llmtune.estimate.measured import MemoryWatch
from llmtune.estimate.memory import COPIES, Forecast, Setting, evaluation_memory, forecast, merge_memory
from llmtune.estimate.optimizers import state_bytes
from llmtune.estimate.passes import without_copies
from llmtune.model.layout import Layout
from llmtune.model.quantize import NF4_BYTES
from llmtune.recipe.sections import Train
from llmtune.training.arguments import OPTIMIZERS
from llmtune.training.loop import train
from llmtune.training.prepare import layout_of
from tests.support import tiny, training

LORA = {"kind": "full", "lr": 1e-3, "adapter": {"kind": "lora", "rank": 4}}
GRADUAL = {"kind": "gradual", "reaches": [0, "all"], "lr": 1e-3}


def laid_out(folder: Path, method: dict[str, Any], **sections: Any) -> Layout:
    """A plan laid over a tiny base of three blocks."""
    base, rows = folder / "base", tiny.write_rows(folder / "rows.jsonl", tiny.sums(20))
    if not base.exists():
        tiny.save_base(base, blocks=3, tied=False, hidden=64)
    recipe = recipes.load(tiny.write_recipe(folder / "recipe.json", base, rows, method, **sections))
    return layout_of(recipe)


def memory(folder: Path, method: dict[str, Any], setting: Setting, **sections: Any) -> Forecast:
    """The prediction for a method on a tiny base."""
    return forecast(laid_out(folder, method, **sections), setting, 40)


def test_states_are_those_of_a_real_step(tmp_path: Path) -> None:
    assert set(OPTIMIZERS) == set(get_args(Train.model_fields["optimizer"].annotation))
    for name in set(OPTIMIZERS) - {"paged_adamw_8bit"}:
        model = tiny.model(blocks=2, hidden=64, tied=False)
        trainer = training.trainer(tmp_path, {"kind": "full", "lr": 1e-3}, model=model, steps=1, optim=OPTIMIZERS[name])
        trainer.train()
        tensors = [
            value
            for state in trainer.optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and not key.startswith("qmap")  # one for all tensors
        ]
        embedding = trainer.model.get_input_embeddings().weight
        others = [tuple(p.shape) for p in trainer.model.parameters() if p is not embedding]
        predicted = state_bytes(name, others, [tuple(embedding.shape)])
        assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(predicted, rel=0.01), name


def test_weights_gradients_and_states_follow_the_plan(tmp_path: Path) -> None:
    layout = laid_out(tmp_path, GRADUAL)
    head, everything = forecast(layout, Setting("cpu", torch.bfloat16), 40).stages
    total = layout.facts.parameters
    top = sum(tensor.numel() for name, tensor in layout.trained.items() if layout.trained_distance[name] == 0)
    positions = sum(buffer.nbytes for buffer in layout.tuned.buffers())
    assert head.parts["weights"] == everything.parts["weights"] == 4 * total + positions
    assert (head.parts["gradients"], everything.parts["gradients"]) == (4 * top, 4 * total)
    assert head.parts["optimizer"] < everything.parts["optimizer"] == 8 * total + 4 * len(layout.trained)
    assert head.plain < everything.plain
    assert head.trace.products.backward < everything.trace.products.backward


def test_4bit_weights_take_half_a_byte_and_their_scales(tmp_path: Path) -> None:
    setting = Setting("cuda", torch.bfloat16)
    whole = memory(tmp_path, LORA, setting).stages[0]
    layout = laid_out(tmp_path, LORA, model={"base": str(tmp_path / "base"), "quantize": "4bit"})
    packed = forecast(layout, setting, 40).stages[0]
    count = sum(layout.skeleton.get_parameter(f"{name}.weight").numel() for name in layout.linear[0])
    saved = whole.parts["weights"] - packed.parts["weights"]
    assert saved == pytest.approx((2 - NF4_BYTES) * count, abs=1)
    assert evaluation_memory(layout, setting).need - evaluation_memory(layout, setting).least == pytest.approx(saved)


def test_merge_takes_the_merged_weights_and_a_4bit_run_its_base_in_fp32(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", blocks=8, tied=False, hidden=64)
    plain, packed = (laid_out(tmp_path, LORA, model={"base": str(base), "quantize": way}) for way in ("none", "4bit"))
    count = plain.facts.parameters
    by_dtype = [merge_memory(plain, dtype).need for dtype in (torch.float32, torch.bfloat16)]
    assert by_dtype[0] - by_dtype[1] == 2 * count
    assert 2 * count < by_dtype[1] < 4 * count
    assert merge_memory(packed, torch.bfloat16).need == 4 * count


def test_shards_share_and_buffers_add(tmp_path: Path) -> None:
    alone, ddp, sharded = (
        memory(tmp_path, {"kind": "full", "lr": 1e-3}, Setting("cuda", torch.bfloat16, world, split)).stages[0].parts
        for world, split in ((1, False), (4, False), (4, True))
    )
    assert ddp == {**alone, "buffers between processes": alone["gradients"]}
    for part in ("weights", "gradients", "optimizer"):
        assert sharded[part] == pytest.approx(alone[part] / 4, rel=0.01)
    assert sharded["gathered weights"] > 0


def test_gpu_keeps_a_16_bit_copy_of_what_trains(tmp_path: Path) -> None:
    layout = laid_out(tmp_path, {"kind": "full", "lr": 1e-3})
    parts = forecast(layout, Setting("cuda", torch.bfloat16), 40).stages[0].parts
    matrices = [module.weight for module in layout.skeleton.modules() if isinstance(module, nn.Linear)]
    assert parts["16-bit copies of weights"] == 2 * sum(weight.numel() for weight in matrices)


def test_cpu_that_keeps_no_copies_casts_into_a_buffer_of_each_shape(tmp_path: Path) -> None:
    layout = laid_out(tmp_path, {"kind": "full", "lr": 1e-3})
    kept = forecast(layout, Setting("cpu", torch.bfloat16), 40)
    matrices = [module.weight for module in layout.skeleton.modules() if isinstance(module, nn.Linear)]
    shapes = {tuple(weight.shape): 2 * weight.numel() for weight in matrices}
    assert kept.stages[0].parts[COPIES] == 2 * sum(weight.numel() for weight in matrices)
    assert without_copies(kept).stages[0].parts == {**kept.stages[0].parts, COPIES: sum(shapes.values())}
    for setting in (Setting("cpu", torch.bfloat16, 2, sharded=True), Setting("cuda", torch.bfloat16)):
        assert without_copies(forecast(layout, setting, 40)) == forecast(layout, setting, 40)


def test_room_is_the_most_that_fits(tmp_path: Path) -> None:
    for kind in ("cuda", "cpu"):
        predicted = memory(tmp_path, LORA, Setting(kind, torch.bfloat16))
        for free in (10**7, 10**9, 10**10):
            for checkpointing in (False, True):
                most = predicted.room(free, checkpointing)
                assert predicted.peak(most, checkpointing) <= free < predicted.peak(most + 2, checkpointing)


def test_working_memory_of_a_block_is_what_its_tensors_take() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(hidden).sin())

    block = Block().to("meta")
    hidden = torch.empty(1, 5, 8, device="meta", requires_grad=True)
    # Kept: up's output, its sine, down's output. At the most beside them: three gradients of up's width, and one of the
    # block's; the derivative of the sine is one of them.
    bytes_of_width = 4 * 5 * 32
    assert working_bytes(block, (hidden,), {}, MetaAutocast(None, "cpu")) in range(bytes_of_width, 4 * bytes_of_width)


def test_casts_are_those_that_torch_lists() -> None:
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    listed = {
        kind: header.split(f"#define AT_FORALL_{kind}(_)")[1].split("// ")[0].split("#define")[0]
        for kind in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE")
    }
    assert {name for name in LOWERED if f"_({name})" not in listed["LOWER_PRECISION_FP"]} <= {
        "conv_transpose2d",  # listed with what sets its overloads apart
        "conv_transpose3d",
    }
    wide = listed["FP32"] + listed["FP32_SET_OPT_DTYPE"]
    assert {name for name in IN_FP32 if f"_({name})" not in wide and f"_({name}," not in wide} == set()


def test_log_shows_predicted_beside_measured_for_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = training.prepare_run(tmp_path, GRADUAL, train={"epochs": 1, "batch_size": 8})
    train(run)
    records = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    stages = [record for record in records if "memory" in record]
    assert [record["stage"] for record in stages] == [1, 2]
    assert all(record["predicted"] > 0 and record["before"] > 0 for record in stages)
    (time,) = [record for record in records if "time" in record]
    steps = [record for record in records if "loss" in record]
    assert time["predicted_seconds"] > 0
    assert (time["step"], time["measured_seconds"]) == (steps[-1]["step"], round(steps[-1]["seconds"], 3))
    out = capsys.readouterr().out
    assert "memory, stage 2: predicted at most" in out
    assert time["time"] in out


def test_gpu_is_measured_by_stage_in_allocated_and_reserved_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    began = []
    cuda = {
        "max_memory_allocated": lambda device: 3_100_000_000,
        "max_memory_reserved": lambda device: 3_400_000_000,
        "reset_peak_memory_stats": lambda device: began.append(device),
    }
    for name, answer in cuda.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    device: Any = SimpleNamespace(type="cuda")
    watch = MemoryWatch(device)
    watch.expect([3_300_000_000], [5])
    assert watch.at(4) is None
    record = watch.at(5)
    assert record is not None
    assert record["memory"] == "memory: predicted 3.3 GB, measured 3.1 GB allocated, 3.4 GB reserved"
    assert (record["allocated"], record["reserved"], len(began)) == (3_100_000_000, 3_400_000_000, 2)
