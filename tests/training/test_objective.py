"""The supervised loss: equal to the plain model's, whatever the micro-batches, and never not a number."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from llmtune.data.batches.collate import Collator, TokenCounts
from llmtune.data.batches.order import order
from llmtune.errors import TrainingError
from tests.support import tiny, training
from tests.support.training import GRADUAL, METHODS, fit


def test_micro_batches_match_one_batch(tmp_path: Path) -> None:
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


def test_loss_and_gradients_match_the_plain_model(tmp_path: Path) -> None:
    plain, inputs = tiny.model(blocks=4, tied=False), Collator(0)(training.rows(4))
    labels = inputs["labels"]
    logits = plain(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()  # type: ignore[no-untyped-call]
    trainer = training.trainer(tmp_path, METHODS["full"])
    ours = trainer.compute_loss(trainer.model, dict(inputs))
    ours.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    expected = dict(plain.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-7)


def test_fails_on_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    model = tiny.model(blocks=4)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss is nan at step 1"):
        fit(tmp_path, METHODS["full"], model=model)


def test_fails_on_gradients_that_are_not_finite_before_they_are_saved(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        """Makes the second step's gradients no numbers; its loss is one."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **named: Any) -> None:
            if state.global_step == 1:
                model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)

    save: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trainer = training.trainer(tmp_path, METHODS["full"], callbacks=[Spoil()], keep=1, **save)
    message = r"^the loss is [\d.]+ but the gradients' norm is nan at step 2; the last checkpoint is kept"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000001"]


def test_fails_on_a_batch_without_a_supervised_token(tmp_path: Path) -> None:
    masked = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8
    with pytest.raises(TrainingError, match="no supervised token"):
        fit(tmp_path, METHODS["full"], data=masked)


def test_validation_leaves_weights_bit_equal(tmp_path: Path) -> None:
    plain = fit(tmp_path, GRADUAL)[1][-1]
    evaluated = fit(tmp_path, GRADUAL, eval_strategy="steps", eval_steps=2, eval_data=training.rows(6, seed=5))[1][-1]
    assert all(torch.equal(plain[name], evaluated[name]) for name in plain)


def test_loss_of_experts_is_the_cross_entropy_alone(tmp_path: Path) -> None:
    model = tiny.model("mixtral", blocks=2, output_router_logits=True)
    inputs = Collator(0)(training.rows(4))
    trainer = training.trainer(tmp_path, METHODS["full"], model=model)
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(inputs)), plain)


def test_counts_tokens_labels_and_padding(tmp_path: Path) -> None:
    data = training.rows(12)
    trainer, _, log = fit(tmp_path, METHODS["full"], data=data, steps=3)
    assert trainer.counts.seen == log[-1]["tokens"] == sum(len(row["input_ids"]) for row in data)
    assert (
        trainer.counts.supervised
        == log[-1]["supervised"]
        == sum(label != -100 for row in data for label in row["labels"][1:])
    )
    assert trainer.objective_state()["counts"]["seen"] == trainer.counts.seen
    assert TokenCounts(seen=6, slots=8).padding == 0.25


@pytest.mark.parametrize("grouped", [False, True], ids=["random", "grouped"])
def test_batches_come_in_the_order_of_seed_and_epoch(tmp_path: Path, grouped: bool) -> None:
    data = [row | {"index": index} for index, row in enumerate(training.rows(24))]
    trainer = training.trainer(tmp_path, METHODS["full"], data=data, grouped=grouped, gradient_accumulation_steps=2)
    loader, lengths = trainer.get_train_dataloader(), [len(row["input_ids"]) for row in data]
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        rows = [index for batch in loader for tensors in batch["passes"] for index in tensors["index"]]
        assert rows == order(lengths, 8, trainer.args.seed, epoch, grouped)
