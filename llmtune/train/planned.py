"""PlannedTrainer: a plan followed by TRL's SFTTrainer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import TrainerCallback

from llmtune.data.order import Ordered
from llmtune.errors import TrainingError
from llmtune.frozen.boundary import Span
from llmtune.frozen.cache import FrozenBlocks
from llmtune.kernels.cpu.install import install
from llmtune.model.blocks import blocks, distances, unwrap
from llmtune.model.layout import drop_states
from llmtune.model.sharded import reshard, warm_up_dtypes
from llmtune.plan.schedule import Schedule
from llmtune.plan.stages import boundaries
from llmtune.train.checkpoint import Checkpointed
from llmtune.train.joined import RowJoiner
from llmtune.train.objective import Measured
from llmtune.train.proof import UpdateCheck


def optimizer_groups(
    tensors: dict[str, nn.Parameter], distance: dict[str, int], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups, one per distance and kind (matrices decay, vectors do not); together exactly `tensors`."""
    made: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in tensors.items():
        key = (distance[name], parameter.ndim > 1)
        decay = weight_decay if key[1] else 0.0
        group = made.setdefault(key, {"params": [], "lr": 1.0, "weight_decay": decay, "distance": key[0]})
        group["params"].append(parameter)
    listed = [parameter for group in made.values() for parameter in group["params"]]
    if sorted(map(id, listed)) != sorted(map(id, tensors.values())):
        raise TrainingError("the optimizer's groups are no partition of what trains")
    return [made[key] for key in sorted(made)]


def freeze_to_stage(tensors: dict[str, nn.Parameter], distance: dict[str, int], schedule: Schedule, step: int) -> None:
    """Let exactly the tensors require gradients that train at `step`."""
    for name, parameter in tensors.items():
        parameter.requires_grad_(schedule.trains(step, distance[name]))


def skip_input_casts(model: nn.Module) -> None:
    """Let LoRA layers give bf16 input straight to autocast; PEFT's way through fp32 and back gives the same bits."""
    for module in (module for module in model.modules() if isinstance(module, LoraLayer)):
        # A dropout or a variant (DoRA) computes in the precision that it is given.
        dropouts = module.lora_dropout.values()
        if not module.lora_variant and all(isinstance(dropout, nn.Identity) for dropout in dropouts):
            module.cast_input_dtype_enabled = False


class PlannedTrainer(Measured, Checkpointed):
    """SFTTrainer whose optimizer groups, rates, trained set, loss and checkpoints follow a plan.

    The optimizer and the DDP or FSDP wrapper see every tensor that will ever train; stages only flip requires_grad.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        make_schedule: Callable[[int], Schedule],
        tensors: dict[str, nn.Parameter],
        record: Callable[[dict[str, Any]], None],
        keep: int,
        frozen_blocks: FrozenBlocks | None = None,
        grouped: bool = False,
        **more: Any,
    ) -> None:
        self._make_schedule = make_schedule
        self._names = list(tensors)
        self.distance = distances(model)
        self._record = record
        self._keep = keep
        self.frozen_blocks, self._grouped = frozen_blocks, grouped
        self._kept_before: list[int] | None = None
        self._supervised = self._seen = 0
        self._step_seen = self._step_slots = 0
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        # SFTTrainer casts what requires a gradient to bf16 in a quantized model, where small updates are rounded away.
        model.requires_grad_(False)
        # With checkpointing on, the embedding's output is made to require a gradient: every block would pay for it.
        unwrap(model).enable_input_require_grads = lambda: None
        packed = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
        if packed:
            raise TrainingError(f"{packed[0]} should train but is quantized")
        # Trainer refuses a quantized model without an adapter; here nothing that is quantized trains.
        quantized = vars(model).pop("is_quantized", None)
        super().__init__(model=model, **more)
        if quantized is not None:
            vars(model)["is_quantized"] = quantized
        for tensor in tensors.values():
            tensor.requires_grad_(True)
            tensor.data = tensor.data.float()
        if self.args.bf16:
            skip_input_casts(model)
        if self.args.device.type == "cpu":
            self._held = install(model, self.args)
        self._unpadded = RowJoiner(model, frozen_blocks, self.accelerator.autocast)
        self.model_accepts_loss_kwargs = True
        self._moved = UpdateCheck(record)
        self.add_callback(_Stages(self))
        self.add_callback(self._moved)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer over the plan's groups."""
        if getattr(self, "optimizer", None) is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr", None)
            listed = optimizer_groups(self.current_tensors(), self.distance, self.args.weight_decay)
            self.optimizer = kind(listed, lr=1.0, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """One function of the step per group: the plan's rate at the group's distance, laid over the steps."""
        self.schedule = self._make_schedule(num_training_steps)
        optimizer = optimizer or self.optimizer
        rates: list[Callable[[int], float]] = [
            partial(self.schedule.rate, distance=group["distance"]) for group in optimizer.param_groups
        ]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Ordered:
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        return Ordered(lengths, self._rows_per_step(), self.args.seed, self._grouped)

    def _rows_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def begin_frozen_blocks(self) -> None:
        """Keep the outputs of what does not train, where the coming steps profit from it, and say what was done."""
        if self.frozen_blocks is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.frozen_blocks = None
            self._record(
                {"step": self.state.global_step, "frozen_blocks": "frozen blocks: not kept where weights are sharded"}
            )
            return
        distance = {name: self.distance[name] for name in self._names}
        step, laid = self.state.global_step, self.schedule
        self._boundaries = boundaries(laid.plan, distance.values(), len(blocks(self.model)))
        ends = [*laid.starts[1:], laid.steps]
        coming = [
            Span(boundary, self._rows_between(max(start, step), end))
            for boundary, start, end in zip(self._boundaries, laid.starts, ends, strict=True)
            if end > step
        ]
        with self.accelerator.local_main_process_first():
            said = self.frozen_blocks.begin(self.model, coming, distance, self.accelerator.autocast, self._kept_before)
        if said:
            self._record({"step": step, "frozen_blocks": said})

    def _rows_between(self, start: int, end: int) -> int:
        """Rows, for training and validation, that pass through the model in steps `start` to `end`."""
        every = self.args.eval_steps if self.eval_dataset is not None else None
        checks = int(end // every - start // every) if every else 0
        return (end - start) * self._rows_per_step() + checks * (len(self.eval_dataset) if checks else 0)

    def enter_stage(self, step: int) -> None:
        """Let exactly what trains at `step` require gradients, and what is kept stand in for what does not."""
        tensors = self.current_tensors()
        freeze_to_stage(tensors, self.distance, self.schedule, step)
        if self.schedule.redraws(step):
            drop_states(self.optimizer, tensors.values())
        if self.frozen_blocks is not None:
            self.frozen_blocks.enter(self._boundaries[self.schedule.stage_at(step)])
        if step in self.schedule.starts:
            self._unpadded.again()

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """The mean loss per supervised token over the evaluation rows; leaves random state and mode as found."""
        # Trainer asks twice where the last step of an epoch is also one to evaluate at.
        if self._evaluated[0] == self.state.global_step:
            return self._evaluated[1]
        training = self.model.training
        self.model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for inputs in self.get_eval_dataloader():
                prepared = self._prepare_inputs(inputs)
                count = int((prepared["labels"][:, 1:] != -100).sum())
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, prepared)
                sums += torch.tensor([float(loss) * count, count], dtype=torch.float64, device=sums.device)
        total, tokens = self.accelerator.reduce(sums, "sum").tolist()
        reshard(self.model)
        self.model.train(training)
        metrics = {"eval_loss": total / max(1, tokens)}
        self._evaluated = (self.state.global_step, metrics)
        self._record({"step": self.state.global_step, **metrics})
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand the step's numbers to the run's log."""
        if "loss" not in logs:
            return
        counts = [self._seen, self._supervised, self._step_seen, self._step_slots]
        self._step_seen = self._step_slots = 0
        seen, supervised, used, slots = self.accelerator.reduce(
            torch.tensor(counts, device=self.args.device), "sum"
        ).tolist()
        step = self.state.global_step
        optimizer_groups = self.optimizer.param_groups
        rates = {str(group["distance"]): self.schedule.rate(step - 1, group["distance"]) for group in optimizer_groups}
        entry = {"step": step, "loss": logs["loss"], "lr": rates, "tokens": seen, "supervised": supervised}
        entry |= self._moved.take()
        self._record(entry | {"padding": 1 - used / max(1, slots), "grad_norm": logs.get("grad_norm")})


class _Stages(TrainerCallback):
    """Flips requires_grad at stage boundaries, from the global step alone, and checks what a boundary must satisfy."""

    def __init__(self, trainer: PlannedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if self.trainer.is_fsdp_enabled:
            warm_up_dtypes(self.trainer.model)
        if self.trainer.args.device.type == "cpu":
            # Accelerate would copy all logits to fp32; the loss does that a few rows at a time.
            self.trainer.accelerator.unwrap_model(self.trainer.model, keep_fp32_wrapper=False)
        self.trainer.begin_frozen_blocks()

    def on_train_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if self.trainer.frozen_blocks is not None:
            self.trainer.frozen_blocks.end()

    def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        trainer = self.trainer
        if state.global_step in trainer.schedule.starts[1:]:
            trainer.assert_replicas_equal()
        trainer.enter_stage(state.global_step)
        tensors = trainer.current_tensors()
        held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        missing = [name for name, p in tensors.items() if p.requires_grad and id(p) not in held]
        if missing:
            raise TrainingError(f"{missing[0]} should train but is not in the optimizer")
