"""Recipes that cannot work: one line on stderr that names the place, exit code 2, nothing trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from llmtune import cli, recipe
from llmtune.errors import LlmtuneError, RecipeError
from llmtune.files import read_json
from llmtune.run_log import read_log
from llmtune.training.loop import train
from llmtune.training.prepare import complete, examine, prepare, prepare_all
from llmtune.training.process import main
from tests.support import tiny
from tests.support.training import prepare_run

LORA = {"kind": "lora", "rank": 4}
FAINT, LOUD = ({**LORA, "alpha": alpha, "rslora": True} for alpha in (1.5e-310, 1.5e308))
STAGE = {"until": 1.0}
STAGED = {"kind": "gradual", "reaches": [1, "all"]}


def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: Any, tied: bool = True, **sections: Any) -> str:
    """The one line that `llmtune check` ends in."""
    tiny.save_base(tmp_path / "base", blocks=3, tied=tied)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    file = tiny.write_recipe(tmp_path / "bad.yaml", tmp_path / "base", data, method, **sections)
    assert cli.main(["check", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"llmtune: {file}:")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ({"kind": "frozen", "reach": 0, "adapter": LORA}, "method: trains no block, so no adapter would train"),
        (
            {"kind": "frozen", "reach": 9},
            "reach 9 is beyond the model, which has 3 blocks; try 3, or all with the embeddings",
        ),
        ({"kind": "gradual", "reaches": [0, 1], "adapter": LORA}, "trains nothing: no tensor is within its reach"),
        ({"kind": "gradual", "reaches": [1, "all"], "until": [0.001, 1.0]}, "cannot hold 2 stages: one of them"),
        ({"kind": "staged", "stages": [{"until": 0.5, "reach": -1}, STAGE]}, "stages.0.reach"),
        ({"kind": "gradual", "reaches": [2, 1]}, "each stage reaches farther than the one before, not 1 after 2"),
        ({"kind": "staged", "stages": [{"until": 0.7}, {"until": 0.3}, STAGE]}, "growing fractions of training; 0.3"),
        ({"kind": "staged", "stages": [{"until": 0.5}]}, "the last stage ends at 1, not 0.5"),
        ({"kind": "discriminative", "decay": 0.0}, "a number > 0 is expected, got 0.0"),
        ({"kind": "discriminative", "decay": -0.5}, "a number > 0 is expected, got -0.5"),
        ({"kind": "discriminative", "decay": 1.6}, "a number <= 1.5 is expected, got 1.6"),
        ({"kind": "full", "adapter": LORA | {"targets": ["lm_head"]}}, "'lm_head' is the head"),
        ({"kind": "full", "adapter": LORA | {"dora": True, "targets": ["embed_tokens"]}}, "is a Embedding"),
        ({"kind": "full", "adapter": LORA | {"dora": True, "targets": ["input_layernorm"]}}, "is a LlamaRMSNorm"),
        ({"kind": "full", "adapter": LORA | {"targets": ["q_proj", "kproj"]}}, "did you mean 'k_proj'"),
        (
            {"kind": "full", "adapter": FAINT},
            "adapter: at these values its default learning rate would be inf; give lr",
        ),
        ({"kind": "lisa", "adapter": LOUD}, "adapter: at these values its default learning rate would be 0; give lr"),
        ({"kind": "full", "adapter": {"kind": "lorra"}}, "did you mean 'lora'"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value).replace('"', "")[:60],
)
def test_refuses_a_method_that_makes_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: Any, line: str
) -> None:
    assert line in check(tmp_path, capsys, method)


@pytest.mark.parametrize(
    ("section", "key", "line"),
    [
        ({"model": {"base": "base", "added_tokens": ["<call>"]}}, "model.added_tokens", "unknown key"),
        ({"data": {"train": "train.jsonl", "new_tokens": ["<call>"]}}, "data.new_tokens", "unknown key"),
        ({"method": {"kind": "full", "adapter": LORA | {"modules_to_save": ["embed_tokens"]}}}, "modules_to_save", ""),
        ({"method": {"kind": "full", "adapter": LORA | {"trainable_token_indices": [3]}}}, "trainable_token", ""),
    ],
)
def test_refuses_to_add_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: dict[str, Any], key: str, line: str
) -> None:
    message = check(tmp_path, capsys, section.pop("method", {"kind": "full"}), **section)
    assert key in message
    assert line in message


def test_refuses_fp16_for_a_launch_on_cpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections: dict[str, Any] = {
        "launch": {"accelerate": "cpu"},
        "model": {"base": str(tmp_path / "base"), "precision": "fp16"},
    }
    message = check(tmp_path, capsys, {"kind": "full"}, **sections)
    assert "model.precision: fp16 is for GPUs, and launch.accelerate: cpu uses none; try auto" in message


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_8bit", "paged_adamw_8bit"])
def test_refuses_an_optimizer_that_cannot_be_sharded_under_fsdp2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    sections: dict[str, Any] = {"launch": {"accelerate": "fsdp2"}, "train": {"optimizer": optimizer}}
    message = check(tmp_path, capsys, {"kind": "full"}, **sections)
    assert f"{optimizer} cannot hold its state sharded under fsdp2; try adamw" in message


FSDP1 = {"ACCELERATE_USE_FSDP": "true"}
FSDP2 = {**FSDP1, "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "sections", "line", "code"),
    [
        ({**FSDP1, "FSDP_VERSION": "1"}, {}, "FSDP1 is not supported", 2),
        (FSDP1, {}, "FSDP1 is not supported", 2),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            {"method": STAGED},
            "config of DeepSpeed, which cannot follow a plan",
            2,
        ),
        (FSDP2, {}, "fsdp2 shards over GPUs, and there is none", 3),
        (FSDP2, {"train": {"optimizer": "adafactor"}}, "adafactor cannot hold its state sharded", 2),
        ({**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "every process reads the base", 2),
        ({**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "train.activation_checkpointing to true", 2),
    ],
)
def test_training_itself_refuses_an_engine_that_cannot_follow(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    sections: dict[str, Any],
    line: str,
    code: int,
) -> None:
    tiny.save_base(tmp_path / "base", blocks=3)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    file = tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", data, **sections)
    made = prepare(recipe.load(file), tmp_path / "run", gpus=0)
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main([str(made.path)]) == code
    message = capsys.readouterr().err
    assert line in message
    assert message.strip().count("\n") == 0
    assert not made.done("train")


@pytest.mark.parametrize("left", ["checkpoints/step-000001", "delta"])
def test_begun_run_keeps_the_findings_on_its_data_and_refuses_other_data(tmp_path: Path, left: str) -> None:
    tiny.save_base(tmp_path / "base", blocks=1)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    file = tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", data)
    prepare(recipe.load(file), tmp_path / "run", gpus=0)
    tiny.write_rows(data, tiny.sums(41))
    run = prepare(recipe.load(file), tmp_path / "run", gpus=0)
    findings = run.data_file.read_text()
    (run.path / left).mkdir(parents=True)
    prepare(recipe.load(file), run.path, gpus=0)
    tiny.write_rows(data, tiny.sums(42))
    with pytest.raises(RecipeError, match=r"/run: the data changed since .* start a new one with --out"):
        prepare(recipe.load(file), run.path, gpus=0)
    assert run.data_file.read_text() == findings
    prepare(recipe.load(file), run.path, gpus=0, overwrite=True)
    assert run.data_file.read_text() != findings


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tells_of_a_tied_head_without_its_embedding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    tiny.save_base(tmp_path / "base", blocks=3, tied=tied)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    file = tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", data, {"kind": "frozen", "reach": 0})
    assert cli.main(["plan", str(file), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["trained"] == (32 if tied else 32 + 259 * 32)
    assert any("the head is the embeddings' matrix" in note for note in table["notes"]) == tied


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"kind": "frozen", "reach": 1, "lr": 0.01}},
        {"method": {"kind": "full", "lr": 0.01, "adapter": LORA}, "quantize": "4bit"},
        {"method": {"kind": "frozen", "reach": 1, "lr": 0.01}, "memory": {"frozen_blocks": "stream"}},
    ],
    ids=["whole", "4bit", "stream"],
)
def test_builds_the_skeleton_once_from_recipe_to_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    tiny.save_base(tmp_path / "base", blocks=3)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    quantize = sections.get("quantize", "none")
    model = {"base": str(tmp_path / "base"), "precision": "fp32", "quantize": quantize}
    others = {key: section for key, section in sections.items() if key != "quantize"}
    file = tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", data, model=model, **others)
    build, built = AutoModelForCausalLM.from_config, []

    def counting(*arguments: Any, **named: Any) -> Any:
        built.append(arguments)
        return build(*arguments, **named)

    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", counting)
    prepared = prepare_all(recipe.load(file), tmp_path / "run", 0)
    train(prepared.run, prepared)
    assert prepared.run.done("train")
    assert len(built) == 1


@pytest.mark.slow
def test_run_prepared_elsewhere_ends_as_one_prepared_here(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", blocks=3)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    method = {"kind": "gradual", "reaches": [1, 2], "lr": 0.01, "adapter": LORA}
    file = tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", data, method)
    here, elsewhere = (prepare_all(recipe.load(file), tmp_path / name, 0) for name in ("here", "elsewhere"))
    train(here.run, here)
    train(elsewhere.run)
    deltas = [load_file(one.run.delta / "adapter_model.safetensors") for one in (here, elsewhere)]
    assert all(torch.equal(tensor, deltas[1][name]) for name, tensor in deltas[0].items())


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps how many elements the largest tensor has that an operation leaves in memory."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("kind", ["lora", "vera", "bottleneck"])
def test_plan_of_a_huge_adapter_takes_no_memory(tmp_path: Path, kind: str) -> None:
    size = "size" if kind == "bottleneck" else "rank"
    method = {"kind": "full", "adapter": {"kind": kind, size: 65_536}}
    rows = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    file = tiny.write_recipe(tmp_path / "big.yaml", tiny.save_base(tmp_path / "base"), rows, method)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        assert examine(recipe.load(file), 0).table.trained > 65_536
    assert largest.elements < 65_536


@pytest.mark.parametrize(
    ("steps", "note"),
    [
        (3, "train.max_steps 3 ends within the first epoch: 12 of 32 rows are seen"),
        (20, "train.max_steps 20 decides: 2.5 passes over the rows, whatever train.epochs says"),
    ],
)
def test_trains_as_many_steps_as_max_steps_says(tmp_path: Path, steps: int, note: str) -> None:
    run = prepare_run(tmp_path, {"kind": "full", "lr": 0.01}, train={"epochs": 1, "batch_size": 4, "max_steps": steps})
    plan = read_json(run.plan_file)
    assert plan["steps"] == steps
    assert note in plan["notes"]
    train(run)
    assert [entry["step"] for entry in read_log(run.log_file) if "loss" in entry] == list(range(1, steps + 1))


def test_names_max_steps_where_it_leaves_a_stage_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = check(tmp_path, capsys, STAGED, train={"max_steps": 1})
    assert "train.max_steps: 1 steps cannot hold 2 stages" in message


def test_refuses_a_seed_that_no_generator_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = check(tmp_path, capsys, {"kind": "full"}, train={"seed": 1764162000000})
    assert "train.seed: a number <= 4294967295 is expected, got 1764162000000" in message


def test_run_of_which_only_the_recipe_was_written_is_completed(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, {"kind": "full", "lr": 0.01})
    plan, data = run.plan_file.read_text(), run.data_file.read_text()
    for lost in ([run.plan_file, run.data_file], [run.data_file]):
        for file in lost:
            file.unlink()
        complete(run, 0)
        assert (run.plan_file.read_text(), run.data_file.read_text()) == (plan, data)
    run.data_file.write_text(data[:20])
    complete(run, 0)
    assert run.data_file.read_text() == data


def test_run_that_lost_its_data_file_after_training_began_is_refused(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, {"kind": "full", "lr": 0.01})
    (run.checkpoints / "step-000001").mkdir(parents=True)
    run.data_file.unlink()
    with pytest.raises(LlmtuneError, match=r"data\.json: is gone or damaged, and .*step-000001 needs it"):
        complete(run, 0)
