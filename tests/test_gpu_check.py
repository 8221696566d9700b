"""The GPU check: its arithmetic, its clock, how parts end, its rows, and one cell of it on the CPU."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from benchmarks.arms import Shape
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bundle, correct, speed
from benchmarks.gpu.budget import Budget, do_items, ends
from benchmarks.gpu.child import Job
from benchmarks.gpu.children import Child, Task, child_environment
from benchmarks.gpu.comparison import contest, table, tools
from benchmarks.gpu.parts import agreement, environment, memory, reads, two
from benchmarks.gpu.report import FAIL, PASS, Line, Report, judged, undone
from benchmarks.gpu.runs.clock import Clock, covered
from benchmarks.gpu.runs.models import SHAPES, choose_model, config, make_base, tokenizer
from benchmarks.gpu.runs.rows import count_tokens, encoded, in_order, write_rows
from llmtune.files import read_json
from tests.support import ROOT

GB = 2**30


def budget(until: float, times: list[float], longest: float = 0.0) -> Budget:
    """A budget whose clock shows these times, one after the other, the last for ever."""
    return Budget(until, longest, lambda: times.pop(0) if len(times) > 1 else times[0])


def check(folder: Path, **more: Any) -> correct.Check:
    """A check on the CPU that prints nothing."""
    return correct.Check("cpu", folder, Report("correct", print_line=lambda text: None), "tiny", **more)


def test_shares_scale_to_the_deadline_and_add_up() -> None:
    assert ends({"a": 10, "b": 30}, began=100, deadline=20) == {"a": 105, "b": 120}
    assert sum(correct.SHARES.values()) == correct.DEADLINE == 270
    assert sum(speed.SHARES.values()) == speed.DEADLINE == 330
    assert set(correct.PARTS) == set(correct.SHARES)


def test_item_that_would_pass_the_end_is_skipped_and_one_that_fails_lets_the_rest_go_on() -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("no such thing\nand more")

    def slow(number: int) -> Any:
        return lambda: {"number": number}

    # One item takes 4 s, so the next fits at 5 s of 10, and the one at 9.5 s does not.
    clock = [0.0, 0.0, 4.0, 5.0, 5.0, 5.5, 9.5]
    items = [("a", slow(1)), ("b", broken), ("c", slow(3))]
    first, second, third = do_items(items, budget(10, clock))
    assert first == {"name": "a", "seconds": 4.0, "number": 1}
    assert second["error"].startswith("ValueError: no such thing (")
    assert "and more" not in second["error"]
    assert "Traceback" in second["traceback"]
    assert third == {"name": "c", "skip": "time"}


def test_budget_expects_the_next_item_to_take_as_long_as_the_longest() -> None:
    assert Budget(10, clock=lambda: 5).fits(5)
    assert not Budget(10, longest=4.5, clock=lambda: 5).fits()
    assert Budget(10, longest=4, clock=lambda: 5).fits()


def test_report_repeats_failures_sums_up_and_sets_the_exit_code(tmp_path: Path) -> None:
    printed: list[str] = []
    report = Report("correct", print_line=printed.append)
    for line in (
        judged("A", "one", True, gap=1),
        Line("A", "two", FAIL),
        Line("E", "card"),
        Line("Q", "", "SKIP (time)"),
    ):
        report.add(line)
    assert report.finish(tmp_path / "out.json") == 1
    assert printed[:4] == ["A one PASS", "A two FAIL", "E card", "Q SKIP (time)"]
    assert printed[4] == "A two FAIL"
    assert printed[5].startswith("correct: 1 PASS 1 FAIL 1 SKIP in ")
    written = read_json(tmp_path / "out.json")
    assert [line["status"] for line in written["lines"]] == [PASS, FAIL, "", "SKIP (time)"]
    assert written["lines"][0]["facts"] == {"gap": 1}


def test_a_report_of_skips_alone_is_no_success() -> None:
    for lines, code in (([PASS], 0), ([PASS, "SKIP (time)"], 0), (["SKIP (time)"], 1), ([PASS, FAIL], 1)):
        report = Report("speed", [Line("A", "", status) for status in lines], print_line=lambda text: None)
        assert report.finish(None) == code


def test_a_part_that_crashes_fails_alone_and_one_without_time_is_skipped(tmp_path: Path) -> None:
    def crashes(check: correct.Check) -> Any:
        yield Line("X", "first", PASS)
        raise RuntimeError("CUDA error")

    one = check(tmp_path, until=time.monotonic() + 60)
    correct.run_part("X", crashes, one)
    correct.run_part("Y", crashes, check(tmp_path, until=time.monotonic()))
    assert [line.status for line in one.report.lines] == [PASS, FAIL]
    assert one.report.lines[1].text.startswith("RuntimeError: CUDA error")
    late = check(tmp_path, until=time.monotonic())
    correct.run_part("Y", crashes, late)
    assert [str(line) for line in late.report.lines] == ["Y SKIP (time)"]


def test_a_process_that_crashes_gives_its_results_and_its_last_words(tmp_path: Path) -> None:
    task = Task("no_such_module:main", "cpu", tmp_path, time.monotonic() + 60, {})
    (answer,) = Child(task, "gone").results()
    assert answer["error"].startswith("ended with code 1: ModuleNotFoundError")
    line = undone("A", answer)
    assert line is not None
    assert line.status == FAIL


def test_a_process_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.children.GRACE", 0.0)
    (answer,) = Child(Task("child:main", "cpu", tmp_path, time.monotonic() - 1, {}), "hangs").results()
    assert "no end 0 s after its time" in answer["error"]


def test_one_cell_trains_on_the_cpu_and_is_judged(tmp_path: Path) -> None:
    correct.make_tiny(tmp_path / "tiny", tmp_path / "short.jsonl")
    more = {"base": str(tmp_path / "tiny"), "rows": str(tmp_path / "short.jsonl"), "runs": "device"}
    job = Job("cpu", tmp_path, Budget(time.monotonic() + 60), more)
    answer = {"seconds": 1, **agreement.train_cell(job, "frozen", "lora", "fp32")}
    assert len(answer["losses"]) == 3
    name = "frozen/lora/fp32"
    assert agreement.judge(name, answer, answer).status == PASS
    for wrong in ({"losses": [loss + 1e-3 for loss in answer["losses"]]}, {"frozen": "other"}, {"changed": ["a"]}):
        assert agreement.judge(name, {**answer, **wrong}, answer).status == FAIL
    assert agreement.judge(name, {"name": name, "skip": "time"}, answer).status == "SKIP (time)"
    assert agreement.judge(name, answer, {"name": name, "error": "broken"}).status == FAIL


def test_five_methods_with_five_adapters_in_fp32_and_two_of_them_in_bf16() -> None:
    cells = agreement.cells()
    assert len(cells) == len(set(cells)) == 25 + 10
    assert {adapter for _, adapter, precision in cells if precision == "bf16"} == {"none", "lora"}


def test_gaps_are_relative_and_infinite_where_nothing_can_be_compared(tmp_path: Path) -> None:
    assert agreement.relative_gap([2.0, 4.04], [2.0, 4.0]) == pytest.approx(0.01)
    assert agreement.relative_gap([1.0], [1.0, 2.0]) == float("inf") == agreement.relative_gap([], [])
    one = {"a": np.array([3.0, 0.0], dtype=np.float32), "b": np.array([4.0], dtype=np.float32)}
    save_file(one, tmp_path / "one.safetensors")
    save_file({**one, "b": np.array([4.5], dtype=np.float32)}, tmp_path / "other.safetensors")
    save_file({"a": one["a"]}, tmp_path / "fewer.safetensors")
    assert agreement.tensor_gap(tmp_path / "one.safetensors", tmp_path / "one.safetensors") == 0
    assert agreement.tensor_gap(tmp_path / "other.safetensors", tmp_path / "one.safetensors") == pytest.approx(0.1)
    assert agreement.tensor_gap(tmp_path / "fewer.safetensors", tmp_path / "one.safetensors") == float("inf")


def run(**more: Any) -> dict[str, Any]:
    """What one tool's process answers."""
    facts: dict[str, Any] = {
        "arm": "lora",
        "rows_kind": "long",
        "tool": "trl",
        "losses": [11.0, 10.0, 9.0, 8.0],
        "note": "",
    }
    facts |= {"timed_s": [0.2, 0.3, 0.1], "steps_s": [1.0, 0.2, 0.3, 0.1, 0.2], "setup_s": 2.0, "first_step_s": 1.0}
    return {**facts, "busy": 0.5, "tokens": 1000, "supervised": 100, "squares": 5000, "rows": 10, **more}


def test_a_row_of_the_table_by_hand() -> None:
    arm, shape = contest.make_arms(16)["lora"], Shape(16, 100, 1000)
    rates = {"gemm_tflops": 1e-9, "peak_tflops": 2e-9}
    ours = {"step_s": 0.1, "losses": [11.01, 10.0, 9.0]}
    row = table.row(run(allocated=GB, reserved=2 * GB), arm, shape, 8, rates, ours)
    assert row["step_s"] == 0.2
    assert row["times"] == pytest.approx(2.0)
    assert row["tokens_s"] == pytest.approx(1000 / 5 / 0.2)
    needed = 1000 * 16 * 100 * 4 + 100 * 1000 * 4 + 16 * 6 * 8 * 5000
    assert row["mfu"] == pytest.approx(needed / 5 / 0.2 / 1e3)
    assert row["mfu_spec"] == pytest.approx(row["mfu"] / 2)
    assert not row["wrong"]
    assert table.in_columns(row).split()[:6] == ["lora", "long", "trl", "0.2000", "0.2000", "1,000"]
    assert table.in_columns(row).startswith(
        "lora     long  trl       0.2000   0.2000  1,000     2.00      1.00     2.00 "
    )
    assert table.header().split()[:3] == ["arm", "rows", "tool"]
    on_cpu = table.in_columns(table.row(run(busy=None), arm, shape, 8, {"gemm_tflops": 1.0}, None))
    assert on_cpu.split()[6:9] == ["-", "-", "-"]


def test_a_row_whose_first_losses_differ_is_wrong() -> None:
    ours = [11.0, 10.0, 9.0, 8.0]
    assert not table.differs([11.019, 9.981, 9.0, 5.0], ours)
    assert table.differs([11.0, 10.0, 9.021], ours)
    assert table.differs([11.0, 10.0], ours)
    assert table.differs([11.0, float("nan"), 9.0], ours)


def test_counts_attention_by_what_trains_and_how_often() -> None:
    arms = contest.make_arms(16)
    forward = 2 * 64 * 500
    assert table.attention_operations(arms["full"], 16, 64, 500) == 16 * 3 * forward
    assert table.attention_operations(arms["lora"], 16, 64, 500) == 16 * 3 * forward
    assert table.attention_operations(arms["frozen8"], 16, 64, 500) == (8 + 3 * 8 * 3) * forward
    assert table.attention_operations(arms["gradual"], 16, 64, 500) == (16 + 4 * 3 + 16 * 3) * forward


def test_several_epochs_are_charged_for_what_is_built_before_them() -> None:
    assert table.seconds_a_step(run(), 1) == 0.2
    assert table.seconds_a_step(run(), 3) == pytest.approx(0.2 + 2.0 / 5)


def test_counts_the_operations_of_the_models_that_are_made() -> None:
    for name in ("tiny", "mid"):
        shape, width = speed.shape_of(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config(name))
        sizes = [sum(p.numel() for p in block.parameters() if p.ndim > 1) for block in model.model.layers]
        assert sizes == [shape.block] * shape.blocks
        assert model.lm_head.weight.numel() == shape.head
        assert width == model.config.num_attention_heads * model.config.head_dim
    assert SHAPES["1b"]["vocab_size"] == 128_256
    assert speed.shape_of("1b")[0].blocks * speed.shape_of("1b")[0].block == pytest.approx(0.973e9, rel=1e-3)


def test_model_and_passes_follow_the_free_memory() -> None:
    assert [choose_model(free * GB) for free in (79, 38, 20, 2)] == ["1b", "1b", "mid", "tiny"]
    assert [contest.rows_a_pass(16, free * GB, "1b") for free in (79, 40)] == [16, 4]
    assert contest.rows_a_pass(2, 0, "tiny") == 2


def test_times_ten_of_fifteen_steps_and_each_stage_warms_up() -> None:
    for name, arm in contest.make_arms(16).items():
        warm, profiled = contest.steps_apart(name, arm.epochs)
        assert len(warm) == 3
        assert contest.STEPS - len(warm) - len(profiled) in (10, 12)
        assert contest.rows_an_epoch(arm, 16) * arm.epochs == contest.STEPS * 16
    assert contest.steps_apart("gradual", 3)[0] == (0, 5, 10)
    assert ("gradual", "long") in contest.runs_of("llmtune")
    assert "gradual" not in [arm for arm, _ in contest.runs_of("trl")]


def test_clock_leaves_out_warm_up_and_profiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "_start_profile", lambda clock: None)
    moments = iter([10.0, 12.0, 12.5, 13.0, 13.5, 15.0, 16.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = Clock("cpu", warm=(0,), profiled=(3,))
    clock.on_train_begin(None, None, None)
    for _ in range(4):
        clock.on_step_begin(None, None, None)
        clock.on_step_end(None, None, None)
    assert clock.setup == 2.0
    assert clock.first_step == 1.5
    assert clock.seconds() == [0.5, 2.0, 1.0, 4.0]
    assert clock.timed() == [2.0, 1.0]
    assert clock.median() == 1.5


def test_busy_time_counts_overlapping_kernels_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert covered([]) == 0


def test_memory_fails_where_the_prediction_is_off_by_over_a_tenth() -> None:
    assert memory.in_words("lora", int(10.9 * GB), 10 * GB, 12 * GB)["status"] == PASS
    off = memory.in_words("lora", 9 * GB - 2**28, 10 * GB, 12 * GB)
    assert off["status"] == FAIL
    assert off["text"] == "lora: predicted 8.75 allocated 10.00 reserved 12.00 GB (-12%)"


def test_two_processes_are_compared_with_one(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, dtype=np.float32)}, tmp_path / "a.safetensors")
    alone = {"losses": [2.0, 1.0], "delta": str(tmp_path / "a.safetensors")}
    assert two.compare_two(alone, [[alone], [{"losses": []}]]).status == PASS
    assert two.compare_two(alone, [[{**alone, "losses": [2.0, 1.1]}], []]).status == FAIL
    assert two.compare_two(alone, [[alone], [{"name": "two-1", "error": "ended"}]]).status == FAIL


def test_counts_reads_of_tensors_by_file_and_line() -> None:
    counter = reads.ReadCounter("cpu")
    counter._start()
    float(torch.ones(1))
    torch.ones(3).nonzero()
    torch.ones(3).sum()
    counter._stop()
    float(torch.ones(1))
    assert sum(counter.places.values()) == 2
    assert all(place.startswith("test_gpu_check.py:") for place in counter.places)


@pytest.mark.slow
def test_tools_train_on_the_same_rows_and_their_first_losses_agree(tmp_path: Path) -> None:
    job = Job("cpu", tmp_path, Budget(time.monotonic() + 300), {"model": "tiny", "rows_a_pass": 1})
    make_base(tmp_path / "base", "tiny", "cpu", torch.bfloat16)
    ours, theirs = (tools.measure(job, tool, "lora", "short") for tool in ("llmtune", "trl-best"))
    for answer in (ours, theirs):
        assert len(answer["losses"]) == len(answer["steps_s"]) == contest.STEPS
        assert len(answer["timed_s"]) == 10
        assert 0 < answer["busy"] <= 1
    assert not table.differs(theirs["losses"], ours["losses"])
    assert ours["losses"][-1] < ours["losses"][0]


def test_rows_are_long_or_short_and_in_the_order_of_training(tmp_path: Path) -> None:
    rows = encoded(write_rows(tmp_path / "long.jsonl", 40, "long"), tokenizer())
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(rows) == 40
    assert min(lengths) >= 250
    assert max(lengths) <= 1024
    short = encoded(write_rows(tmp_path / "short.jsonl", 40, "short"), tokenizer())
    assert max(len(row["input_ids"]) for row in short) <= 96
    assert len({json.dumps(row) for row in rows}) == 40
    ordered = in_order(rows, 8, 2)
    assert sorted(map(str, ordered[:40])) == sorted(map(str, ordered[40:])) == sorted(map(str, rows))
    tokens, supervised, squares = count_tokens(rows)
    assert (tokens, squares) == (sum(lengths), sum(length**2 for length in lengths))
    assert 0 < supervised < tokens


def test_without_a_gpu_it_says_so_in_one_line_and_ends_with_3(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["correct"]) == 3
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        command.parse(["correct", "--only", "Z"])
    assert "its parts are E, A, Q" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", 65),
    ],
)
def test_knows_the_stated_rate_of_a_card_by_its_name(name: str, rate: float) -> None:
    assert environment.peak_tflops(name) == rate
    assert environment.peak_tflops("NVIDIA B200") is None


def test_a_child_sees_one_gpu_whose_allocator_grows_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    on_gpu, on_cpu = (child_environment(Task("", device, tmp_path, 0.0, {})) for device in ("cuda", "cpu"))
    assert (on_gpu["CUDA_VISIBLE_DEVICES"], on_cpu["CUDA_VISIBLE_DEVICES"]) == ("3", "")
    assert on_gpu["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in on_cpu
    assert (on_gpu["ACCELERATE_USE_CPU"], on_cpu["ACCELERATE_USE_CPU"]) == ("false", "true")


def test_bundle_takes_versions_of_the_constraints_and_one_library_of_bitsandbytes() -> None:
    pins = bundle.versions((ROOT / "constraints.txt").read_text())
    assert len(pins) == len(bundle.PACKAGES)
    assert any(pin.startswith("transformers==5.") for pin in pins)
    assert bundle.is_kept("bitsandbytes/libbitsandbytes_cuda130.so")
    assert not bundle.is_kept("bitsandbytes/libbitsandbytes_cuda118.so")
    assert bundle.is_kept("transformers/trainer.py")
    assert bundle.is_kept("trl-1.16.0.dist-info/METADATA")
    assert not bundle.is_kept("datasets/tests/test_a.py")
