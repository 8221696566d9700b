"""What training asserts of itself, and what it keeps of the libraries' defaults."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmtune import recipe
from llmtune.errors import TrainingError
from llmtune.run import Run
from llmtune.train import planned
from llmtune.train.arguments import ARGUMENTS, OPTIMIZERS
from llmtune.train.loop import train
from llmtune.train.planned import _Stages, optimizer_groups
from llmtune.train.prepare import prepare
from tests.support import tiny, training
from tests.support.versions import installed_as_pinned

GOLDEN = Path(__file__).parent / "arguments.json"
OURS = {"max_steps", "save_steps", "eval_steps", "use_cpu", "bf16", "dataloader_pin_memory"}


def made(tmp_path: Path, method: dict[str, Any]) -> Run:
    """A prepared run on a tiny base."""
    tiny.save_base(tmp_path / "base", blocks=3)
    data = tiny.write_rows(tmp_path / "train.jsonl", tiny.sums(40))
    return prepare(
        recipe.load(tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "base", data, method)), tmp_path / "run", 0
    )


def test_a_tensor_that_is_to_train_but_is_in_no_group_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = optimizer_groups
    monkeypatch.setattr(
        planned, "optimizer_groups", lambda tensors, distance, decay: original(
            {name: p for name, p in tensors.items() if distance[name] < 2}, distance, decay
        ),
    )  # fmt: skip
    method = {"kind": "gradual", "reaches": [1, "all"], "lr": 0.01}
    with pytest.raises(TrainingError, match=r"embed_tokens\.weight should train but is not in the optimizer"):
        training.trainer(tmp_path, method).train()


def test_a_run_in_which_nothing_changed_at_some_distance_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = optimizer_groups

    def stale(tensors: dict[str, Any], distance: dict[str, int], decay: float) -> Any:
        copies = {n: nn.Parameter(p.detach().clone()) if distance[n] == 2 else p for n, p in tensors.items()}
        for name, copy in copies.items():
            copy.requires_grad_(tensors[name].requires_grad)
        return original(copies, distance, decay)

    done = made(tmp_path, {"kind": "full", "lr": 0.01})
    monkeypatch.setattr(planned, "optimizer_groups", stale)
    monkeypatch.setattr(_Stages, "on_step_begin", lambda *_, **__: None)
    with pytest.raises(TrainingError, match="nothing at distance 2 changed, so it was not trained"):
        train(done)
    assert not done.done("train")


def test_a_run_in_which_single_tensors_never_changed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, lost = optimizer_groups, {f"model.layers.{at}.mlp.up_proj.weight" for at in (0, 1)}

    def stale(tensors: dict[str, Any], distance: dict[str, int], decay: float) -> Any:
        copies = {n: nn.Parameter(p.detach().clone()) if n in lost else p for n, p in tensors.items()}
        return original(copies, distance, decay)

    done = made(tmp_path, {"kind": "full", "lr": 0.01})
    monkeypatch.setattr(planned, "optimizer_groups", stale)
    monkeypatch.setattr(_Stages, "on_step_begin", lambda *_, **__: None)
    train(done)
    said = [entry["warning"] for entry in map(json.loads, done.log_file.read_text().splitlines()) if "warning" in entry]
    assert said == [f"warning: never changed, though to be trained: {min(lost)} and 1 more"]


@pytest.mark.parametrize("adapter", ["none", {"kind": "lora", "rank": 4}], ids=["none", "lora"])
def test_what_trains_is_fp32_and_moves_where_the_model_is_bf16(tmp_path: Path, adapter: Any) -> None:
    watch = training.Watch()
    method = {"kind": "frozen", "reach": 2, "lr": 1e-5, "adapter": adapter}
    model = tiny.model(blocks=4, tied=False).bfloat16()
    made = training.trainer(tmp_path, method, model=model, callbacks=[watch], bf16=True)
    made.train()
    trained = made.current_tensors()
    for name, parameter in made.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
    assert {tensor.dtype for tensor in made.trained_state().values()} == {torch.float32}
    for name, tensor in trained.items():
        moved = (tensor.detach() != watch.before[0][name]).float().mean()
        assert moved > 0.5 or "lora_A" in name or "lm_head" in name, f"{name}: {moved:.0%}"
    if adapter == "none":
        norm = trained["model.norm.weight"].detach() - watch.before[0]["model.norm.weight"]
        assert (norm != 0).all()


@pytest.mark.parametrize(
    ("precision", "adapter"),
    [(torch.float32, "none"), (torch.float32, {"kind": "lora", "rank": 4}), (torch.bfloat16, "none")],
    ids=["fp32", "fp32-lora", "bf16"],
)
def test_a_step_that_moves_few_of_the_weights_is_told(tmp_path: Path, precision: torch.dtype, adapter: Any) -> None:
    log: list[dict[str, Any]] = []
    method = {"kind": "full", "lr": 1e-5, "adapter": adapter}
    made = training.trainer(tmp_path, method, record=log.append)
    made.model.to(precision)  # as where the fp32 copy of what trains is lost
    made.train()
    changed = [entry["changed"] for entry in log if "changed" in entry]
    told = [entry for entry in log if "warning" in entry]
    assert [entry["step"] for entry in log if "changed" in entry] == [3]
    if precision == torch.float32:
        assert changed[0] > 0.99
        assert not told
    else:
        assert changed[0] < 0.5
        assert told[0]["step"] == 3
        assert told[0]["warning"].startswith(f"warning: the step changed {changed[0]:.0%} of the elements")


def test_the_libraries_defaults_of_a_run_are_kept_and_known(tmp_path: Path) -> None:
    done = made(tmp_path, {"kind": "full", "lr": 0.01})
    train(done)
    kept = json.loads((done.path / ARGUMENTS).read_text())
    assert str(tmp_path) not in json.dumps(kept)
    golden = json.loads(GOLDEN.read_text())
    changed = {key for key in kept.keys() | golden.keys() if kept.get(key) != golden.get(key)}
    if not installed_as_pinned("transformers", "trl"):
        changed -= golden.keys() - kept.keys()  # an older version lacks them
    assert changed <= OURS, f"other arguments than tests/arguments.json knows: {sorted(changed - OURS)}"
    assert kept["loss_type"] == golden["loss_type"]


def test_the_loss_of_experts_is_the_cross_entropy_alone(tmp_path: Path) -> None:
    model = tiny.model("mixtral", blocks=2, output_router_logits=True)
    inputs = training.Collator(0)(training.rows(4))
    made = training.trainer(tmp_path, {"kind": "full", "lr": 0.01}, model=model)
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(made.compute_loss(made.model, dict(inputs)), plain)


def test_the_golden_arguments_are_those_of_the_recipe(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["optim"] == OPTIMIZERS["adamw"]
    assert golden["average_tokens_across_devices"] is True
    assert golden["logging_nan_inf_filter"] is False


def test_rates_over_three_stages_are_the_closed_form(tmp_path: Path) -> None:
    used: list[dict[int, float]] = []
    lr, reach, first = (0.01, 0.02, 0.005), (1, 2, 5), (0, 0, 3, 6, 6, 6)
    method = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": list(lr), "bottom_ratio": 0.1}
    log: list[dict[str, Any]] = []
    made = training.trainer(
        tmp_path, method, steps=9, shape="cosine", warmup=2 / 9, callbacks=[training.Rates(used)], record=log.append
    )
    made.train()
    for step in range(9):
        fall = 0.5 * (1 + math.cos(math.pi * max(0, step - 2) / 7))
        expected = {
            far: lr[step // 3] * 0.1 ** (far / 3) * min(1, (step - first[far] + 1) / 2) * fall
            if far <= reach[step // 3]
            else 0.0
            for far in range(6)
        }
        assert used[step] == pytest.approx(expected, abs=1e-12)
        assert log[step]["lr"] == {str(far): rate for far, rate in used[step].items()}
