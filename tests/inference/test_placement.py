"""The base of a run goes where its recipe computes, and in 4 bits where the whole one does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

from llmtune.answering import speakers
from llmtune.answering.sampling import Sampling
from llmtune.errors import FullMemoryError
from llmtune.evaluation.step import evaluate
from llmtune.files import read_json
from llmtune.inference import placement
from llmtune.inference.placement import load_placed, place
from llmtune.machine import processes
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from llmtune.model.quantize import load_quantized
from llmtune.recipe.compare import DEFINING
from llmtune.reporting.page import report
from llmtune.run import Run
from tests.support import runs
from tests.support.runs import with_held_out_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FROZEN = {"kind": "frozen", "reach": 1, "lr": 1e-3}


def run_in_4bit(folder: Path, method: dict[str, Any]) -> Run:
    """A run whose recipe trains over a base in 4 bits, stored in fp32, and computes in bf16."""
    section = {"base": str(folder / "base"), "precision": "bf16", "quantize": "4bit"}
    return with_held_out_rows(folder, method=method, hidden=128, model=section, step=0.3)


@pytest.fixture(scope="module")
def over_4bit(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an adapter over a base in 4 bits."""
    return run_in_4bit(tmp_path_factory.mktemp("4bit"), runs.LORA)


@pytest.fixture(scope="module")
def over_whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run over a base in whole, that computes in fp32, as its files are."""
    return with_held_out_rows(tmp_path_factory.mktemp("whole"))


def free(monkeypatch: pytest.MonkeyPatch, number: int, where: torch.device) -> None:
    """Let that many bytes be free on the device of the run."""
    monkeypatch.setattr(placement, "launch_device", lambda launch: where)
    monkeypatch.setattr(placement, "free_bytes", lambda device: number)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep what is loaded in 4 bits, and let nothing be loaded in whole."""
    loaded: list[Any] = []

    def read(*arguments: Any) -> Any:
        loaded.append(load_quantized(*arguments))
        return loaded[-1]

    monkeypatch.setattr(placement, "load_quantized", read)
    monkeypatch.setattr(placement, "load_model", lambda *_: pytest.fail("the whole base was loaded"))
    return loaded


def test_4bit_run_is_evaluated_on_its_4bit_base_where_the_whole_one_does_not_fit(
    over_4bit: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free(monkeypatch, 500_000, CPU)
    loaded = recorded(monkeypatch)
    stored = evaluate(over_4bit)
    assert len(loaded) == 1
    assert any(isinstance(module, Linear4bit) for module in loaded[0].modules())
    for settings in (stored["settings"], read_json(over_4bit.eval / "tuned.json")["settings"]):
        assert (settings["quantize"], settings["dtype"], settings["device"]) == ("4bit", "bfloat16", "cpu")
    base, tuned = (stored[name]["results"]["held_out"]["metrics"]["loss"]["value"] for name in ("base", "tuned"))
    assert base is not None is not tuned
    assert abs(base - tuned) > 1e-3
    note = (
        "evaluation: the base takes 657 kB in 16 bits and answers 1.1 GB more, and 500 kB is free on cpu, so the 4-bit"
    )
    assert note in capsys.readouterr().out
    assert "over the 4-bit base that was trained" in report(over_4bit).read_text()


def test_4bit_run_chats_on_one_4bit_base_where_the_whole_one_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in_4bit(tmp_path, FROZEN)
    free(monkeypatch, 500_000, CPU)
    loaded = recorded(monkeypatch)
    answers = [one.reply("7 plus 1?", Sampling(max_new_tokens=6)) for one in speakers.load_speakers(run)]
    assert answers[0] != answers[1]
    assert len(loaded) == 1
    assert "chat: the base takes 657 kB in 16 bits" in capsys.readouterr().err


def test_whole_base_answers_where_it_fits(over_4bit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    base = locate_base(over_4bit.recipe().model)
    for number, bits in ((660_000 + placement.ROOM, None), (650_000 + placement.ROOM, 4)):
        free(monkeypatch, number, GPU)
        assert place(over_4bit.recipe(), base).bits == bits


def test_processes_choose_one_form_by_what_the_one_with_the_least_room_has(
    over_4bit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, settings = locate_base(over_4bit.recipe().model), over_4bit.recipe()
    enough = 660_000 + placement.ROOM
    free(monkeypatch, enough, GPU)
    assert place(settings, base).bits is None
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "here", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda value: [value, 500_000])
    chosen = place(settings, base)
    assert chosen.bits == 4
    assert "500 kB is free for each of 2 processes, so the 4-bit base" in chosen.note
    monkeypatch.setattr(processes, "gather", lambda value: [value, value])
    # Each has a GPU of its own, but half of the machine's memory.
    for number, where, bits in ((enough, GPU, None), (enough, CPU, 4), (2 * enough, CPU, None)):
        free(monkeypatch, number, where)
        assert place(settings, base).bits == bits
    free(monkeypatch, 100_000, CPU)
    words = r"and 50\.0 kB is free for each of 2 processes; free some memory, or add --set launch\.processes=1$"
    with pytest.raises(FullMemoryError, match=words):
        place(settings, base)


def test_weights_go_straight_to_the_device_of_the_run(over_4bit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    base, settings = locate_base(over_4bit.recipe().model), over_4bit.recipe()
    options: list[dict[str, Any]] = []
    real = AutoModelForCausalLM.from_pretrained

    def read(*arguments: Any, **named: Any) -> Any:
        options.append({key: named.get(key) for key in ("device_map", "dtype", "quantization_config")})
        return real(*arguments, **{**named, "device_map": None})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    for number, bits in ((2 * placement.ROOM, None), (500_000, 4)):
        free(monkeypatch, number, GPU)
        chosen = place(settings, base)
        assert (chosen.device, chosen.dtype, chosen.bits) == (GPU, torch.bfloat16, bits)
        load_placed(base, settings, chosen)
        assert options[-1]["device_map"] == {"": "cuda:0"}
        assert options[-1]["dtype"] == torch.bfloat16
        assert (options[-1]["quantization_config"] is not None) == (bits == 4)
    load_model(base, device=CPU)
    assert options[-1]["device_map"] is None
    load_model(base, keep=["lm_head"], device=CPU)
    assert options[-1]["device_map"] == {"": "cpu"}


def test_recipe_for_the_cpu_computes_there_though_a_gpu_is_there(
    over_whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, base = over_whole.recipe(), locate_base(over_whole.recipe().model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(placement, "free_bytes", lambda device: 2**40)
    for name, kind in (("cpu", "cpu"), ("multi_cpu", "cpu"), ("auto", "cuda"), ("single_gpu", "cuda")):
        launch = settings.launch.model_copy(update={"accelerate": name})
        assert place(settings.model_copy(update={"launch": launch}), base).device.type == kind


def test_base_larger_than_the_device_is_refused_before_it_is_read(
    over_whole: Run, over_4bit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "launch" not in DEFINING
    monkeypatch.setattr(placement, "load_model", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(placement, "load_quantized", lambda *_: pytest.fail("it was read"))
    free(monkeypatch, 50_000, GPU)
    words = (
        r"base takes 108 kB in 32 bits, and 50\.0 kB is free on cuda:0; free some of it, or add --set launch.accelera"
    )
    for work in (evaluate, speakers.load_speakers):
        with pytest.raises(FullMemoryError, match=words):
            work(over_whole)
    with pytest.raises(FullMemoryError, match=r"base takes \d+ kB in 4 bits, and 50\.0 kB is free on cuda:0"):
        evaluate(over_4bit)
    free(monkeypatch, 50_000, CPU)
    with pytest.raises(FullMemoryError, match=r"50\.0 kB is free in memory; free some memory$"):
        evaluate(over_4bit)
    # Files in the dtype of the computation are mapped on a CPU, and need no room.
    assert place(over_whole.recipe(), locate_base(over_whole.recipe().model)).device == CPU
