"""A run that goes on from an adapter or a run: same values, one delta against the base, or one line on why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune import recipe
from llmtune.adapters.delta import load_delta
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.errors import RecipeError
from llmtune.files import read_json
from llmtune.model.base import load_model
from llmtune.model.files.locate import locate_base
from llmtune.publishing.card import card
from llmtune.reporting.page import report
from llmtune.run import Run, open_run
from llmtune.training.bases.find import find_start
from llmtune.training.bases.start import load_start
from llmtune.training.loop import train
from llmtune.training.objective import SupervisedTrainer
from llmtune.training.prepare import layout_of, plan_alone, prepare
from tests.support import runs, tiny

IDS = torch.arange(3, 40)[None]
LORA = {"kind": "full", "lr": 0.01, "adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
PUBLISH = {"repo": "me/tuned"}
FULL = {"kind": "frozen", "reach": 1, "lr": 0.01}


def write(folder: Path, base: Path, method: dict[str, Any], name: str = "b", **model: Any) -> Path:
    """Write a recipe of two steps."""
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sums(20))
    section = {"base": str(base), "precision": "fp32", **model}
    settings = {"max_steps": 2, "batch_size": 4, "warmup": 0}
    return tiny.write_recipe(
        folder / f"{name}.yaml", base, rows, method, model=section, train=settings, publish=PUBLISH
    )


def a_run(folder: Path, base: Path, method: dict[str, Any], name: str = "b", **model: Any) -> Run:
    """Prepare a run of two steps."""
    return prepare(recipe.load(write(folder, base, method, name, **model)), folder / name, 0)


def mistake(folder: Path, base: Path, method: dict[str, Any], **model: Any) -> str:
    """What plan says of a recipe, in one line of exit code 2."""
    with pytest.raises(RecipeError) as caught:
        plan_alone(recipe.load(write(folder, base, method, "wrong", **model)), 0)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "")


@pytest.fixture(scope="module")
def firsts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a run with LoRA and one without an adapter on it, as training leaves them."""
    folder = tmp_path_factory.mktemp("firsts")
    base = tiny.save_base(folder / "base")
    runs.perturbed(a_run(folder, base, LORA, "lora"))
    runs.perturbed(a_run(folder, base, FULL, "tensors"))
    return folder


@pytest.mark.parametrize(
    ("first", "method"),
    [
        ("lora", {"kind": "full", "lr": 0.01, "adapter": {"kind": "lora"}}),
        pytest.param("tensors", {"kind": "gradual", "lr": 0.01, "reaches": [0, 1]}, marks=pytest.mark.slow),
        ("tensors", {"kind": "frozen", "reach": 0, "lr": 0.01}),
    ],
)
def test_goes_on_from_a_run_bit_for_bit(
    tmp_path: Path, firsts: Path, first: str, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = runs.load_tuned(open_run(firsts / first))
    seen: dict[str, Any] = {}
    original = SupervisedTrainer.train

    def look(self: Any, **named: Any) -> Any:
        seen["logits"] = self.model.eval()(IDS).logits.detach()
        seen["facts"] = self.frozen_blocks._policy.facts if self.frozen_blocks else None
        self.model.train()
        return original(self, **named)

    monkeypatch.setattr(SupervisedTrainer, "train", look)
    run = a_run(tmp_path, firsts / "base", method, start=str(firsts / first))
    train(run)
    assert torch.equal(seen["logits"], before(IDS).logits)
    before_names = set(load_file(next((firsts / first / "delta").glob("*.safetensors"))))
    after = load_file(next(run.delta.glob("*.safetensors")))
    assert before_names <= set(after), "the delta is against the base: what the first run changed is in it"
    tuned = load_delta(load_model(locate_base(run.recipe().model)), run.delta)(IDS).logits
    assert (tuned - seen["logits"]).abs().max() > 1e-3
    if first == "lora":
        assert run.recipe().method.adapter.model_dump()["alpha"] == 8
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(firsts / "base"), str(run.delta))
        assert torch.equal(stock(IDS).logits, tuned)
    facts = run.manifest()["start"]
    assert seen["facts"] is None or seen["facts"]["start"] == facts["sha256"], "cached outputs are of one start"
    assert (seen["facts"] is None) == (first == "lora")
    assert (facts["name"], facts["kind"]) == (first, "adapter" if first == "lora" else "tensors")
    assert read_json(run.delta / "base.json")["start"] == facts
    assert f"goes on from {first}" in "".join(read_json(run.plan_file)["notes"])
    assert f"goes on from {first}" in run.log_file.read_text()
    assert read_json(run.plan_file)["delta_bytes"] == 4 * sum(tensor.numel() for tensor in after.values())
    assert f"went on from `{first}`" in card(run)
    page = report(run).read_text()
    assert f"goes on from</dt><dd>{first} (SHA-256 {facts['sha256'][:12]})" in page


def test_an_adapter_named_as_base_stands_for_its_base(tmp_path: Path, firsts: Path) -> None:
    adapter = Path(shutil.copytree(firsts / "lora" / "delta", tmp_path / "adapter"))
    (adapter / "base.json").unlink()
    run = a_run(tmp_path, adapter, {**LORA, "adapter": {"kind": "lora"}})
    model = run.recipe().model
    assert (model.base, model.start) == (str(firsts / "base"), str(adapter))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert "/adapter is an adapter that names no base; name its base here" in mistake(tmp_path, adapter, LORA)
    assert "wrong.yaml" in mistake(tmp_path, firsts / "lora", LORA)
    assert "is a run; go on from it with model.start" in mistake(tmp_path, firsts / "lora", LORA)


def test_an_adapter_on_the_hub_stands_for_its_base(
    tmp_path: Path, firsts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "c0ffee" * 6 + "0000"
    adapter = Path(shutil.copytree(firsts / "lora" / "delta", tmp_path / "snapshots" / commit))
    revisions: list[Any] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "someone/adapter"
        revisions.append(revision)
        return str(adapter)

    monkeypatch.setattr("llmtune.model.files.locate.snapshot_download", download)
    monkeypatch.setattr("llmtune.training.bases.find.snapshot_download", download)
    method = {**LORA, "adapter": {"kind": "lora"}}
    run = a_run(tmp_path, Path("someone/adapter"), method, revision="v1")
    model = run.recipe().model
    assert (model.base, model.revision) == (str(firsts / "base"), None)
    assert model.start == f"someone/adapter@{commit}"
    assert set(revisions) == {"v1", commit}
    assert run.manifest()["start"]["name"] == f"someone/adapter@{commit}"


def test_refuses_a_start_that_does_not_fit(tmp_path: Path, firsts: Path) -> None:
    base, lora, tensors = firsts / "base", str(firsts / "lora"), str(firsts / "tensors")

    def of(adapter: Any, start: str = lora, **more: Any) -> str:
        method = {"kind": "full", "lr": 0.01, "adapter": adapter, **more.pop("method", {})}
        return mistake(tmp_path, more.pop("base", base), method, start=start, **more)

    said = of({"kind": "lora", "rank": 8})
    assert said.startswith("/wrong.yaml:")
    assert f"method.adapter.rank: 8 contradicts {lora}, which was trained with 4" in said
    assert "method.adapter.alpha: 16.0 contradicts" in of({"kind": "lora", "alpha": 16})
    assert "method.adapter.init: takes weight out of the base" in of({"kind": "lora", "init": "pissa"})
    assert "is an adapter of the kind lora, not vera; write adapter: lora" in of({"kind": "vera"})
    assert "is an adapter of the kind lora, not none; write adapter: lora" in of("none")
    assert "on which no adapter can go on as one delta" in of({"kind": "lora"}, tensors)
    assert "model.start: no run or adapter nowhere (looked for " in of({"kind": "lora"}, "nowhere")
    assert "is neither a run (recipe.yaml) nor an adapter" in of({"kind": "lora"}, str(base))
    said = of({"kind": "lora", "targets": ["q_proj"]})
    assert "model.start:" in said
    assert "does not fit what this recipe trains: of base_model.model.model.layers.0" in said
    assert "(28 tensors there, 14 here)" in of({"kind": "lora"}, method={"kind": "frozen", "reach": 1})
    assert "model.quantize: would round model.layers.1." in mistake(
        tmp_path, base, {"kind": "frozen", "reach": 0, "lr": 0.01}, start=tensors, quantize="4bit"
    )
    other = tiny.save_base(tmp_path / "other", seed=1)
    assert "whose model.safetensors differs; name that base in model.base" in of({"kind": "lora"}, base=other)
    with pytest.raises(RecipeError, match=r"model\.start: .* is the folder of this run itself"):
        prepare(recipe.load(write(tmp_path, base, LORA, "own", start=lora)), firsts / "lora", 0, overwrite=True)
    untrained = a_run(tmp_path, base, LORA, "untrained")
    assert "is not trained yet; first: llmtune train" in of({"kind": "lora"}, str(untrained.path))


def test_a_start_that_changed_ends_a_resume_in_one_line(tmp_path: Path, firsts: Path) -> None:
    adapter = Path(shutil.copytree(firsts / "lora" / "delta", tmp_path / "adapter"))
    run = a_run(tmp_path, firsts / "base", {**LORA, "adapter": {"kind": "lora"}}, start=str(adapter))
    (run.checkpoints / "step-1").mkdir(parents=True)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"adapter: changed since the run .* began to train on it; put it back"):
        train(run)
    shutil.rmtree(adapter)
    with pytest.raises(RecipeError, match=r"model\.start: no run or adapter"):
        train(run)


EXPERTS: dict[str, Any] = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [0],
}


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("qwen3_moe", {"kind": "lora", "rank": 4}),
        ("gpt2", {"kind": "ia3"}),
        pytest.param("llama", {"kind": "vera", "rank": 8, "d_initial": 0.2}, marks=pytest.mark.slow),
        ("llama", {"kind": "lora", "rank": 4, "dora": True, "ranks": {"q_proj": 8}, "alphas": {"k_proj": 4}}),
        ("llama", "none"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_takes_what_a_recipe_leaves_open_from_the_start(tmp_path: Path, kind: str, adapter: Any) -> None:
    has_experts = kind == "qwen3_moe"  # and new tokens too, in embeddings and head
    base = tiny.save_base(tmp_path / "base", kind, blocks=3, **({**EXPERTS, "tied": False} if has_experts else {}))
    model_section: dict[str, Any] = {"add_tokens": ["<a>", "<b>"]} if has_experts else {}
    method = {"kind": "full", "lr": 0.01}
    first = runs.perturbed(a_run(tmp_path, base, {**method, "adapter": adapter}, "first", **model_section))
    open_ = adapter if adapter == "none" else {"kind": adapter["kind"]}
    named = {**model_section, "start": str(first.path), "precision": "bf16"}
    settings = a_run(tmp_path, base, {**method, "adapter": open_}, **named).recipe()
    start = find_start(settings)
    assert start is not None
    plan, extended = layout_of(settings).plan, locate_base(settings.model)
    ids = torch.cat([IDS, torch.tensor([extended.added], dtype=torch.long)], 1)
    for dtype in (torch.float32, torch.bfloat16):
        model = insert(load_model(extended, dtype), settings.method.adapter, plan, extended)
        load_start(model, start, trained_tensors(model, plan))
        tensors = trained_tensors(model, plan)  # finds distances in a model of two precisions
        assert {one.dtype for one in tensors.values()} == {torch.float32}
        if dtype is torch.float32:
            assert torch.equal(model.eval()(ids).logits, runs.load_tuned(first)(ids).logits)


@pytest.mark.slow
def test_new_tokens_go_on_too(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    first = a_run(tmp_path, base, LORA, "a", add_tokens=["plus"])
    train(first)
    second = a_run(tmp_path, base, LORA, start=str(first.path), add_tokens=["plus"])
    train(second)
    before, after = (load_file(run.delta / "adapter_model.safetensors") for run in (first, second))
    (name,) = (name for name in before if "trainable_tokens" in name)
    assert 0 < (after[name] - before[name]).abs().max() < 0.1
    assert before.keys() == after.keys()
