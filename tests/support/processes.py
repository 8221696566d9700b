"""Two processes of tests/training/test_processes.py: `torchrun -m tests.support.processes OUT`, or `fsdp2 OUT`."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.adapters import lora_starts
from llmtune.adapters.insert import insert, trained_tensors
from llmtune.data.batches.collate import Collator
from llmtune.data.batches.passes import PassLimits
from llmtune.errors import TrainingError
from llmtune.files import fingerprint
from llmtune.kernels import head
from llmtune.model.base import model_facts
from llmtune.model.blocks import blocks, distances
from llmtune.model.sharded import prepare_to_shard, raise_to_fp32
from llmtune.plan.schedule import Schedule
from llmtune.training import checkpoint
from llmtune.training import process as training_process
from llmtune.training.checkpoint import complete_checkpoints
from llmtune.training.distributed import join_processes
from llmtune.training.stages.groups import freeze_to_stage, optimizer_groups
from llmtune.training.stages.states import drop_states
from tests.support import architectures, tiny, training

GRADUAL = {"kind": "gradual", "reaches": [1, 2, "all"], "lr": 0.01, "bottom_ratio": 0.3}
LORA = {"kind": "lora", "rank": 4}
METHODS: dict[str, dict[str, Any]] = {
    "staged": GRADUAL,
    "narrowing": {"kind": "staged", "stages": [{"until": 0.5, "lr": 0.01}, {"until": 1.0, "reach": 1, "lr": 0.01}]},
    "lora": {"kind": "full", "lr": 0.01, "adapter": LORA},
    "staged-lora": {**GRADUAL, "adapter": LORA},
    "lisa": {"kind": "lisa", "blocks": 1, "every": 2, "lr": 0.01},
    "experts": {**GRADUAL, "reaches": [1, 2], "adapter": LORA},
}
VERA = {
    "kind": "staged",
    "stages": [{"until": 0.5, "lr": 3.0}, {"until": 1.0, "reach": 1, "lr": 2.0}],
    "adapter": {"kind": "vera", "rank": 8},
}
STEPS = 6
VALIDATED = (1, 3, 81)


def steps(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The trained tensors after a plain loop over the trainer's groups, stages and rates; sharded where `world` > 1."""
    model = architectures.model("qwen3_moe") if name == "experts" else tiny.model(blocks=4, tied=False)
    recipe = training.spec(METHODS[name])
    plan = recipe.method.plan(model_facts(model))
    torch.manual_seed(0)
    tuned = insert(model, recipe.method.adapter, plan, training.BASE)
    names, distance = list(trained_tensors(tuned, plan)), distances(tuned)
    tuned.requires_grad_(False)
    for name in names:
        tuned.get_parameter(name).requires_grad_(True)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in blocks(tuned):
            fully_shard(block, mesh=mesh)
        fully_shard(tuned, mesh=mesh)
    live = dict(tuned.named_parameters())
    tensors = {name: live[name] for name in names}
    # With Adam's usual eps the step is the sign of a gradient near 0, which rounding turns.
    optimizer = torch.optim.AdamW(optimizer_groups(tensors, distance, 0.1), lr=1.0, eps=1e-4)
    schedule = Schedule(plan, STEPS, 0.2, "linear")
    rates: list[Callable[[int], float]] = [
        partial(schedule.rate, distance=group["distance"]) for group in optimizer.param_groups
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    rows, collate = training.rows(), Collator(0)
    for step in range(STEPS):
        freeze_to_stage(tensors, distance, schedule, step)
        if schedule.redraws(step):
            drop_states(optimizer, tensors.values())
        batch = rows[4 * step : 4 * step + 4]
        count = sum(label != -100 for row in batch for label in row["labels"][1:])
        inputs = collate(batch[rank::world])
        logits = tuned(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
        (loss * world).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {name: (p.full_tensor() if world > 1 else p).detach().contiguous() for name, p in tensors.items()}


def reduction_gap(rank: int, world: int, prepares: bool) -> float:
    """How far a sharded layer's gradient is from the mean of the processes' own, in bf16, relative in the norm."""
    torch.manual_seed(0)
    layer, rows = nn.Linear(64, 64, bias=False), torch.randn(8, 64)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    if prepares:
        prepare_to_shard(layer, plugin)
        raise_to_fp32(layer.parameters())
    own = []
    for index in range(world):
        weight = layer.weight.detach().bfloat16().requires_grad_(True)
        loss = nn.functional.linear(rows[index::world].bfloat16(), weight).float().square().sum()
        own.append(torch.autograd.grad(loss, weight)[0].float())
    fully_shard(layer, mesh=init_device_mesh("cpu", (world,)), mp_policy=plugin.mixed_precision_policy)
    torch.autograd.backward(layer(rows[rank::world]).float().square().sum())
    mean, gradient = torch.stack(own).mean(0), layer.weight.grad
    assert isinstance(gradient, DTensor)
    return float((gradient.full_tensor() - mean).norm() / mean.norm())


class _Meddle(TrainerCallback):
    """Changes one element of one tensor in the second process, in the first stage."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **named: object
    ) -> None:
        if state.global_step == 1 and dist.get_rank() == 1:
            with torch.no_grad():
                next(model.parameters())[0, 0] += 1e-3


def drift(out: Path) -> None:
    """Train in stages while something meddles with the second process; write how that ended."""
    train(out, METHODS["staged"], callbacks=[_Meddle()])


def lisa(out: Path) -> None:
    """Train with LISA in passes of 20 tokens at most, on rows that are no multiple of a step's; write the weights."""
    train(out, METHODS["lisa"], limits=PassLimits(tokens=20), data=training.rows(21))


def vera(out: Path) -> None:
    """Train VeRA in stages; write the vectors."""
    train(out, VERA)


def train(out: Path, method: dict[str, Any], **options: Any) -> None:
    """Train in two processes; write the weights, what was counted, the step that was reached, and an error."""
    settings: dict[str, Any] = {"ddp_backend": "gloo", "save_strategy": "no", "optim": "sgd"}
    trainer = training.trainer(out, method, **settings, **options)
    assert trainer.args.world_size == 2
    try:
        trainer.train()
    except TrainingError as error:
        (out / f"error-{dist.get_rank()}").write_text(str(error))
    (out / f"reached-{dist.get_rank()}").write_text(str(trainer.state.global_step))
    state = trainer.trained_state()
    if dist.get_rank() == 0:
        save_file(state, out / "trained.safetensors")
        (out / "counts.json").write_text(json.dumps(asdict(trainer.counts)))


@contextmanager
def counted(facts: dict[str, Any]) -> Iterator[None]:
    """Note bytes that DDP sends in each backward pass, files that are hashed, and layers whose start is computed."""
    facts |= {"reduced": [], "hashed": [], "starts": 0}
    wrap, hash_file, start = DistributedDataParallel.__init__, fingerprint, lora_starts._STARTS["pissa"]

    def wrapped(self: DistributedDataParallel, *arguments: Any, **named: Any) -> None:
        wrap(self, *arguments, **named)
        self.register_comm_hook(dist.group.WORLD, lambda group, bucket: reduce(group, bucket))

    def reduce(group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        facts["reduced"][-1] += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(group, bucket)

    def hashed(path: Path) -> dict[str, Any]:
        facts["hashed"].append(path.name)
        return hash_file(path)

    def computed(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        facts["starts"] += 1
        return start(weight, rank)

    with (
        patch.object(DistributedDataParallel, "__init__", wrapped),
        patch.object(checkpoint, "fingerprint", hashed),
        patch.dict(lora_starts._STARTS, pissa=computed),
    ):
        yield


@dataclass
class _NewStep(TrainerCallback):
    """Begins a count at every step."""

    counts: list[int]

    def on_step_begin(self, *_: object, **named: object) -> None:
        self.counts.append(0)


def staged(out: Path) -> None:
    """Train in stages and once more from the middle of one, start PiSSA; write what was counted in this process."""
    facts: dict[str, Any] = {}
    group: Any = dist.group.WORLD
    facts["timeout"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    settings: dict[str, Any] = {"ddp_backend": "gloo", "optim": "sgd", "save_strategy": "steps", "save_steps": 1}
    with counted(facts):
        for name, resume in (("whole", None), ("resumed", out / "whole" / "step-000003")):
            callbacks = [_NewStep(facts["reduced"])]
            trainer = training.trainer(out / name, GRADUAL, callbacks=callbacks, **settings)
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            state = trainer.trained_state()
            if dist.get_rank() == 0:
                save_file(state, out / f"{name}.safetensors")
        start_pissa(out / "pissa")
    (out / f"facts-{dist.get_rank()}.json").write_text(json.dumps(facts))


def start_pissa(folder: Path) -> None:
    """Write where PiSSA starts on a tiny model."""
    model, recipe = tiny.model(blocks=3), training.spec({"kind": "full", "adapter": {**LORA, "init": "pissa"}})
    tuned = insert(model, recipe.method.adapter, recipe.method.plan(model_facts(model)), training.BASE)
    recipe.method.adapter.move_weight(tuned, folder, False, "cpu")


def in_head(out: Path) -> None:
    """Train twice, with the loss over all logits and in the head; write what was trained."""
    for name, computes in (("plain", False), ("head", True)):
        with patch.object(head, "computes_in_head", partial(lambda answer, device: answer, computes)):
            trainer = training.trainer(out, METHODS["staged"], ddp_backend="gloo", save_strategy="no", optim="sgd")
            trainer.train()
        state = trainer.trained_state()
        if dist.get_rank() == 0:
            save_file(state, out / f"{name}.safetensors")


def validate(out: Path) -> None:
    """Write the validation loss over each number of rows in VALIDATED, as these processes reckon it."""
    losses = {count: training.validation_loss(out, count) for count in VALIDATED}
    if dist.get_rank() == 0:
        (out / "losses.json").write_text(json.dumps(losses))


def shard(out: Path) -> None:
    """Take sharded steps with every method; write what was trained, and how far sharded gradients are off."""
    for name in METHODS:
        result = steps(name, dist.get_rank(), dist.get_world_size())
        if dist.get_rank() == 0:
            save_file(result, out / f"{name}.safetensors")
    gaps = [reduction_gap(dist.get_rank(), dist.get_world_size(), prepares) for prepares in (False, True)]
    (out / "gaps.json").write_text(json.dumps(gaps))


def fsdp2(folder: Path) -> None:
    """Train the runs in a folder, each a second time from its second checkpoint, through Accelerate's FSDP2."""
    original = PartialState.__init__

    def disguised(self: PartialState, *arguments: Any, **named: Any) -> None:
        # Accelerate keeps FSDP2 from CPUs, unless they pass for GPUs.
        original(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    copied, to_host = list[int](), torch.Tensor.cpu

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.nbytes)
        return to_host(tensor)

    setattr(torch.Tensor, "cpu", copy)  # noqa: B010 - no type checker takes the other way
    PartialState.__init__ = disguised
    PartialState.destroy_process_group = lambda self: None  # the next run needs it
    for run in sorted(path.parent for path in folder.glob("*/recipe.yaml")):
        assert training_process.main([str(run)]) == 0
        assert AcceleratorState._shared_state["distributed_type"] == DistributedType.FSDP
        whole = complete_checkpoints(run / "checkpoints")
        if dist.get_rank() == 0:
            (run / "delta").rename(run / "whole")
            for late in whole[2:]:
                shutil.rmtree(late)
        dist.barrier()
        assert training_process.main([str(run)]) == 0
    (folder / f"copied-{dist.get_rank()}.json").write_text(json.dumps(sum(copied)))
    dist.destroy_process_group()


TASKS = (staged, shard, validate, lisa, vera, in_head, drift)
"""What the processes do one after the other, each in a folder of its own, for the import of the libraries is long."""


def main(arguments: list[str]) -> None:
    """One of the two processes."""
    out = Path(arguments[-1])
    if arguments[0] == "fsdp2":
        fsdp2(out)
        return
    join_processes()
    for task in TASKS:
        folder = out / task.__name__
        folder.mkdir(exist_ok=True)
        task(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
