"""What trains, at which rate, and what stays, step by step, on tiny models in fp32."""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from llmtune.errors import TrainingError
from llmtune.model.blocks import distances
from llmtune.train.checkpoint import complete_checkpoints
from llmtune.train.planned import TrainerCallback, optimizer_groups
from llmtune.train.proof import checksums
from tests.support import tiny, training

GRADUAL = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
DISTANCES = {"full": [5] * 6, "frozen": [2] * 6, "gradual": [1, 1, 2, 2, 5, 5], "narrowing": [5, 5, 1, 1, 1, 1]}
METHODS = {
    "full": {"kind": "full", "lr": 0.01},
    "frozen": {"kind": "frozen", "reach": 2, "lr": 0.01},
    "gradual": GRADUAL,
    "narrowing": {"kind": "staged", "stages": [{"until": 0.34, "lr": 0.01}, {"until": 1.0, "reach": 1, "lr": 0.01}]},
}


def far(name: str) -> int:
    """The distance of a parameter of the model of four blocks."""
    inside = re.search(r"layers\.(\d+)\.", name)
    return 4 - int(inside.group(1)) if inside else 5 if "embed_tokens" in name else 0


def fit(tmp_path: Path, method: dict[str, Any], **more: Any) -> tuple[Any, list[dict[str, torch.Tensor]], list[Any]]:
    """The trainer after training, the parameters before each step and at the end, and the log."""
    watch, log = training.Watch(), []
    made = training.trainer(tmp_path, method, callbacks=[watch], record=log.append, **more)
    made.train()
    end = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    return made, [*watch.before, end], log


@pytest.mark.parametrize("adapter", ["none", LORA, {"kind": "ia3"}], ids=["none", "lora", "ia3"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_planned_tensors_change_at_every_step(
    tmp_path: Path, method: str, checkpointing: bool, adapter: Any
) -> None:
    made, snapshots, _ = fit(
        tmp_path,
        {**METHODS[method], "adapter": adapter},
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        weight_decay=0.1,
    )
    own = (lambda name: "lora" in name or "ia3" in name) if isinstance(made.model, PeftModel) else (lambda name: True)
    for step, reach in enumerate(DISTANCES[method]):
        planned = {name for name in snapshots[0] if far(name) <= reach and own(name)}
        moved = {name for name in snapshots[0] if not torch.equal(snapshots[step][name], snapshots[step + 1][name])}
        assert moved == planned, f"step {step + 1}"


FALLS: dict[str, Any] = {
    "constant": lambda past: 1.0,
    "linear": lambda past: 1 - past,
    "cosine": lambda past: 0.5 * (1 + math.cos(math.pi * past)),
}


@pytest.mark.parametrize("method", [GRADUAL, {**GRADUAL, "bottom_ratio": 0.1}, {**GRADUAL, "adapter": LORA}])
@pytest.mark.parametrize("shape", FALLS)
def test_logged_rate_of_every_group_is_the_plans(tmp_path: Path, method: dict[str, Any], shape: str) -> None:
    seen: list[dict[int, float]] = []
    log: list[dict[str, Any]] = []
    training.trainer(
        tmp_path, method, steps=9, shape=shape, warmup=2 / 9, callbacks=[training.Rates(seen)], record=log.append
    ).train()
    reach, since, ratio = (1, 2, 5), (0, 0, 3, 6, 6, 6), method.get("bottom_ratio", 1.0)
    for step, (used, entry) in enumerate(zip(seen, log, strict=True)):
        fall = FALLS[shape](max(0, step - 2) / 7)
        expected = {
            far: 0.01 * ratio ** (far / 3) * min(1, (step - since[far] + 1) / 2) * fall * (far <= reach[step // 3])
            for far in used
        }
        assert used == pytest.approx(expected, abs=1e-12)
        assert entry["lr"] == {str(distance): rate for distance, rate in used.items()}
    assert set(seen[0]) == ({1, 2, 3, 4} if "adapter" in method else {0, 1, 2, 3, 4, 5})
    assert len(seen) == 9


@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
def test_first_step_moves_weights_in_proportion_to_their_rate(tmp_path: Path, adapter: Any) -> None:
    method = {"kind": "discriminative", "decay": 0.5, "lr": 0.1, "adapter": adapter}
    model = tiny.model(blocks=4, tied=False)
    grads: dict[str, torch.Tensor] = {}

    class Grads(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **named: Any) -> None:
            grads.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    watch = training.Watch()
    made = training.trainer(tmp_path, method, model=model, steps=1, callbacks=[watch, Grads()], optim="sgd")
    made.train()
    end = dict(made.model.named_parameters())
    kinds = defaultdict(set)
    for name, gradient in grads.items():
        rate = 0.1 * 0.5 ** made.distance[name]
        torch.testing.assert_close(end[name] - watch.before[0][name], -rate * gradient, rtol=1e-4, atol=1e-6)
        kinds[made.distance[name]].add(name)
    assert set(kinds) == ({0, 1, 2, 3, 4, 5} if adapter == "none" else {1, 2, 3, 4})


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", ["frozen", "gradual", "lora-top"])
def test_backward_stops_at_the_farthest_distance_that_trains(tmp_path: Path, method: str, checkpointing: bool) -> None:
    spec = {**METHODS["frozen"], "adapter": LORA} if method == "lora-top" else METHODS[method]
    reaches = DISTANCES["frozen" if method == "lora-top" else method]
    model = tiny.model(blocks=4, tied=False)
    reached: list[set[int]] = []

    class NewStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            reached.append(set())

    blocks = list(model.model.layers)

    def watch(distance: int) -> Any:
        def forward(module: Any, arguments: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: reached[-1].add(distance))

        return forward

    made = training.trainer(tmp_path, spec, model=model, callbacks=[NewStep()], gradient_checkpointing=checkpointing)
    for index, block in enumerate(blocks):
        block.register_forward_hook(watch(4 - index))
    made.train()
    for step, reach in enumerate(reaches):
        assert reached[step] == set(range(1, min(reach, 4) + 1)), f"step {step + 1}"


def test_micro_batches_do_not_change_the_result(tmp_path: Path) -> None:
    ends = []
    for size, passes in ((8, 1), (4, 2), (2, 4)):
        _, snapshots, _ = fit(
            tmp_path,
            GRADUAL | {"lr": 0.1},
            data=training.rows(20),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=passes,
            optim="sgd",
        )
        ends.append(snapshots[-1])
    for other in ends[1:]:
        for name, tensor in ends[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-6)


def test_loss_and_gradients_are_the_plain_models(tmp_path: Path) -> None:
    plain, inputs = tiny.model(blocks=4, tied=False), training.Collator(0)(training.rows(4))
    labels = inputs["labels"]
    logits = plain(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    made = training.trainer(tmp_path, METHODS["full"])
    ours = made.compute_loss(made.model, dict(inputs))
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    expected = dict(plain.named_parameters())
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-7)


def test_groups_partition_what_trains() -> None:
    model = tiny.model(blocks=3)
    tensors, distance = dict(model.named_parameters()), distances(model)
    made = optimizer_groups(tensors, distance, 0.1)
    listed = [id(parameter) for group in made for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in tensors.values())
    assert {(group["distance"], group["weight_decay"]) for group in made} == {
        (0, 0.0), (1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1), (3, 0.0), (3, 0.1), (4, 0.1),
    }  # fmt: skip


def test_not_a_number_ends_the_run(tmp_path: Path) -> None:
    model = tiny.model(blocks=4)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss is nan at step 1"):
        fit(tmp_path, METHODS["full"], model=model)


def test_a_batch_without_a_supervised_token_ends_the_run(tmp_path: Path) -> None:
    masked = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8
    with pytest.raises(TrainingError, match="no supervised token"):
        fit(tmp_path, METHODS["full"], data=masked)


def test_checksums_see_one_changed_element() -> None:
    tensor = torch.randn(33, 7)
    before = checksums({"a": tensor, "b": tensor.bfloat16()})
    assert before == checksums({"a": tensor.clone(), "b": tensor.bfloat16()})
    tensor[3, 3] += 1e-6
    assert before["a"] != checksums({"a": tensor})["a"]


def test_validation_changes_nothing(tmp_path: Path) -> None:
    plain = fit(tmp_path, GRADUAL)[1][-1]
    evaluated = fit(tmp_path, GRADUAL, eval_strategy="steps", eval_steps=2, eval_data=training.rows(6, seed=5))[1][-1]
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", LORA], ids=["none", "lora"])
def test_resumed_after_any_step_ends_bit_equal(tmp_path: Path, adapter: Any) -> None:
    spec = {**GRADUAL, "adapter": adapter}
    settings: dict[str, Any] = {"shape": "cosine", "warmup": 0.2, "save_strategy": "steps", "save_steps": 1}
    _, whole, log = fit(tmp_path / "whole", spec, **settings)
    checkpoints = complete_checkpoints(tmp_path / "whole")
    assert [folder.name for folder in checkpoints] == [f"step-{n:06d}" for n in range(1, 7)]
    for step, checkpoint in enumerate(checkpoints[:-1], 1):
        again: list[dict[str, Any]] = []
        made = training.trainer(tmp_path / "again", spec, record=again.append, **settings)
        made.train(resume_from_checkpoint=str(checkpoint))
        assert [entry["step"] for entry in again] == list(range(step + 1, 7))
        assert again == log[step:]
        end = dict(made.model.named_parameters())
        assert all(torch.equal(end[name], whole[-1][name]) for name in end)


def test_a_damaged_checkpoint_is_never_resumed_from(tmp_path: Path) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=2)
    newest = tmp_path / "step-000006"
    names = [file.name for file in newest.iterdir()]
    assert len(names) >= 6
    for name in names:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        assert complete_checkpoints(tmp_path)[-1].name == "step-000004", name
        (newest / name).unlink()
        assert complete_checkpoints(tmp_path)[-1].name == "step-000004", name
        (newest / name).write_bytes(content)
    assert complete_checkpoints(tmp_path)[-1] == newest


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    fit(tmp_path, METHODS["full"], save_strategy="steps", save_steps=1, keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-000005", "step-000006"]
