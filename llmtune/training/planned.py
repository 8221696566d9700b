"""Planned: any transformers.Trainer follows a plan; what is learned is the Trainer's own matter."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from llmtune.machine.precision import catch_up, skipped
from llmtune.model.blocks import distances, unwrap
from llmtune.model.sharded import gather_to_host, prepare_to_shard, raise_to_fp32, warm_up_dtypes
from llmtune.plan.schedule import Schedule
from llmtune.run_log import Record
from llmtune.training import checkpoint as checkpoints
from llmtune.training.arguments import accepted_by_trainer
from llmtune.training.proof import UpdateCheck, assert_replicas_equal, checksum, checksums, prove_schedule
from llmtune.training.sealing import Sealing
from llmtune.training.stages import groups, states
from llmtune.training.stages.callback import PlanCallback
from llmtune.training.stages.replicas import rewrap
from llmtune.working import working


class Planned(Trainer):
    """A Trainer whose optimizer groups, rates, trained tensors, checkpoints and proof follow a plan.

    It knows neither rows nor loss, and stands before any Trainer: `class PlannedDPO(Planned, DPOTrainer)`. The
    optimizer and FSDP see every tensor that will ever train, DDP what trains in a stage; stages flip requires_grad.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        make_schedule: Callable[[int], Schedule],
        tensors: dict[str, nn.Parameter],
        record: Callable[[Record], None],
        keep: int,
        **arguments: object,
    ) -> None:
        """`make_schedule` lays the plan over that many steps; `tensors` ever train; `keep` checkpoints stay.

        `arguments` go to the Trainer.
        """
        groups.check_floating(tensors)
        self._make_schedule, self._record, self._keep = make_schedule, record, keep
        self._trained_names = list(tensors)
        self._tensors: dict[str, nn.Parameter] | None = None
        self.distance = distances(model)
        model.requires_grad_(False)  # now: TRL's trainers cast what requires a gradient to bf16 in a quantized model
        with accepted_by_trainer(model):
            super().__init__(model=model, **arguments)
        # TRL's trainers let the embedding's output require a gradient, as Trainer does later: see begin_plan.
        unwrap(model).disable_input_require_grads()
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        if not self.is_fsdp_enabled:  # which raises shards: whole copies would fill the memory of the host
            groups.hold_in_fp32(model, tensors.values())
        live = model.named_parameters()
        self._checksums = {name: checksum(p.float() if name in tensors else p) for name, p in live}
        self._reduced: set[str] = set()
        self._saved: tuple[Path, dict[str, int]] | None = None
        self._sealing = Sealing()
        self._update_check = UpdateCheck(record)
        self.add_callback(PlanCallback(self))
        self.add_callback(self._update_check)

    def train(self, resume_from_checkpoint: str | None = None, **named: object) -> TrainOutput:
        """Train as the plan says; every checkpoint is complete when it ends, however it ends."""
        with self._sealing:
            return super().train(resume_from_checkpoint, **named)

    def end_step(self) -> None:
        """What an objective does after each step, before a validation or a checkpoint."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: Trainer's estimate, which nothing here reads, walks over all parameters in every pass."""
        return 0

    def objective_state(self) -> dict[str, Any]:
        """What the objective saves in a checkpoint, as plain values."""
        return {}

    def load_objective_state(self, state: dict[str, Any]) -> None:
        """Take back what `objective_state` gave."""

    def enter_stage(self, step: int) -> None:
        """Let exactly what trains at `step` require gradients; where a stage draws anew, the rest loses its states."""
        tensors = self.current_tensors()
        groups.freeze_to_stage(tensors, self.distance, self.schedule, step)
        if self.schedule.redraws(step):
            states.drop_states(self.optimizer, tensors.values())
        learning = {name for name, tensor in tensors.items() if tensor.requires_grad}
        if learning != self._reduced and isinstance(self.model_wrapped, DistributedDataParallel):
            handler = self.accelerator.ddp_handler
            rewrap(self.model_wrapped, handler.to_kwargs() if handler else {})
        self._reduced = learning

    def current_tensors(self) -> dict[str, nn.Parameter]:
        """The tensors that ever train, by name, as the model holds them now: sharding replaces them."""
        if self._tensors is not None:
            return self._tensors
        live = dict(self.model.named_parameters())
        return {name: live[name] for name in self._trained_names}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over the plan's groups; the model is ready to be wrapped then."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr", None)
            parameters = groups.optimizer_groups(self.current_tensors(), self.distance, self.args.weight_decay)
            self.optimizer: torch.optim.Optimizer = kind(parameters, lr=1.0, **options)
            if options.get("optim_bits") == 8:
                groups.keep_embeddings_in_32_bits(self.model)
        self._prepare_to_wrap()
        return self.optimizer

    def _prepare_to_wrap(self) -> None:
        """Let what requires a gradient be what DDP is to reduce at first, and under FSDP nothing."""
        if self.is_fsdp_enabled:
            prepare_to_shard(self.model, self.accelerator.state.fsdp_plugin)
        elif self.args.world_size > 1 and self.state.max_steps > 0:
            tensors, schedule = self.current_tensors(), self._make_schedule(self.state.max_steps)
            groups.freeze_to_stage(tensors, self.distance, schedule, self.state.global_step)
            self._reduced = {name for name, tensor in tensors.items() if tensor.requires_grad}

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """One function of the step per group: the plan's rate at the group's distance."""
        if self.is_fsdp_enabled:  # the model is sharded now
            raise_to_fp32(self.current_tensors().values())
        self.schedule = self._make_schedule(num_training_steps)
        optimizer = optimizer or self.optimizer
        rates: list[Callable[[int], float]] = [
            partial(self.schedule.rate, distance=group["distance"]) for group in optimizer.param_groups
        ]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The batches of the next step, and how many tokens they teach; none after the last step."""
        # Trainer looks for the end after a step alone: resumed from the last checkpoint, it would take one step more.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def begin_plan(self) -> None:
        """Prepare the model, wrapped for training, for stages."""
        # With checkpointing on, Trainer makes the embedding's output require a gradient: every block would pay for it.
        unwrap(self.model).disable_input_require_grads()
        if self.is_fsdp_enabled:
            warm_up_dtypes(self.model)
        self._tensors = None
        self._tensors = self.current_tensors()

    def end_plan(self) -> None:
        """Leave the model as an objective wants it after the last step."""

    def begin_step(self, step: int) -> None:
        """Enter the stage of a step, and check what must hold there; raises TrainingError."""
        self.control.should_save |= self._sealing.has_failed  # which ends the training, once that is saved
        if step in self.schedule.starts[1:]:
            assert_replicas_equal(self.current_tensors(), step)
        self.enter_stage(step)
        catch_up(self.lr_scheduler, step)
        groups.check_grouped(self.current_tensors(), self.optimizer)

    def step_record(self) -> Record:
        """What is known of the latest step without its loss."""
        step = self.state.global_step
        rates = {str(g["distance"]): self.schedule.rate(step - 1, g["distance"]) for g in self.optimizer.param_groups}
        return {"step": step, "lr": rates, **self._update_check.take()}

    def record_step(self, loss: float, gradient_norm: float | None) -> None:
        """Hand a step's numbers, which Trainer read, to the run's log."""
        entry = self.step_record() | skipped(self.args.fp16, gradient_norm)
        self._record({"step": entry["step"], "loss": loss, **entry, "grad_norm": gradient_norm})

    def record_evaluation(self, loss: float, score: float | None) -> None:
        """Hand a validation's numbers to the run's log."""
        scored = {} if score is None else {"eval_score": score}
        self._record({"step": self.state.global_step, "eval_loss": loss, **scored})

    def prove_changes(self) -> list[str]:
        """The trained tensors that never changed; raises TrainingError where the changes are not the plan's."""
        return prove_schedule(self._checksums, self.model, self._trained_names, self.distance, self.schedule.moves)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name, on the CPU, in fp32: for the first process, though each must ask."""
        return gather_to_host(self.current_tensors(), self.args.process_index == 0)

    def file_of(self, trained: dict[str, torch.Tensor]) -> Path | None:
        """The file of the newest checkpoint that this process wrote, where it holds exactly this `trained_state`."""
        if self._saved and self._saved[0].is_file() and self._saved[1] == checksums(trained):
            return self._saved[0]
        return None

    # Trainer has no public way to write other checkpoints than its own, which are not atomic and hold every weight.

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        step, first = self.state.global_step, self.args.should_save
        tensors, objective = self.current_tensors(), self.objective_state()
        assert_replicas_equal(tensors, step)
        ends = step >= self.state.max_steps  # no step follows that would need the optimizer's states
        size = checkpoints.checkpoint_size(tensors.values(), None if ends else self.optimizer)
        keep = (self._keep, self.state.best_global_step)
        target = checkpoints.checkpoint_folder(Path(self.args.output_dir), step)
        with (
            working("writing a checkpoint", on_terminal=False),
            self._sealing.after_the_last(beside=not ends and self.args.world_size == 1) as then,
            checkpoints.write_checkpoint(target, first, size, keep, then) as draft,
        ):
            trained = self.trained_state()
            if first:
                checkpoints.save_state(draft, trained, objective)
                self._saved = (target / checkpoints.TENSORS, checksums(trained))
                self.state.save_to_json(str(draft.folder / checkpoints.TRAINER_STATE))
            del trained  # before the states of the optimizer, which take twice as much
            if not ends:
                self._save_optimizer_and_scheduler(str(draft.folder))
            self._save_rng_state(str(draft.folder))
            self._save_scaler(str(draft.folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_objective_state(checkpoints.load_state(Path(resume_from_checkpoint), self.current_tensors()))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            # Accelerate's way wants a state for every parameter, and those of later stages have none yet.
            states.save_sharded_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir), self.args.should_save)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not states.has_states(Path(checkpoint), self.state.max_steps):
            return
        with working("reading the optimizer's states", on_terminal=False):
            if self.is_fsdp_enabled:
                states.load_sharded_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
