"""One Trainer for every objective, on `transformers.Trainer` (public methods only)."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer as TransformersTrainer
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from everalign.data.collate import Batch, TrainingPlan
from everalign.data.tokenization import TokenizedRow
from everalign.distributed import gather
from everalign.errors import DivergedError
from everalign.modeling.sharding import data_parallel
from everalign.training.base_objective import Objective
from everalign.training.hooks import RowTerms, RowValues, StageHooks, make_batch
from everalign.training.options import StageOptions


class Steps(Dataset[list[Batch]]):
    """A stage's optimiser steps: an item is one process's share of a step, micro-batches collated when asked for.

    Args:
        rows: those of the stage.
        plan: the steps' rows, as `training_plan` makes them.
        objective: lays out a micro-batch.
        shared: compute a prompt once for all its answers.
        reference: for each row (K,), summed log-probabilities of its responses under the reference; None where the
            objective needs none.
        terms: what a method adds to the rows; None for nothing.
        own: how many of the rows, from the first on, are the task's own; None for all.
        in_step: give all processes as many micro-batches of a step.
    """

    def __init__(
        self,
        rows: Sequence[TokenizedRow],
        plan: TrainingPlan,
        objective: Objective,
        shared: bool,
        reference: RowValues | None,
        terms: RowTerms | None = None,
        own: int | None = None,
        in_step: bool = False,
    ) -> None:
        self._rows, self._objective, self._shared, self._own = rows, objective, shared, own
        self._reference, self._terms = reference, terms
        self._shares, self._processes, self._in_step = plan.shares, plan.processes, in_step

    def __len__(self) -> int:
        return len(self._shares)

    def __getitem__(self, index: int) -> list[Batch]:
        # Where the other processes have the step's last rows, some row that does not count.
        least, first = 1, index - index % self._processes
        if self._in_step:
            least = max(map(len, self._shares[first : first + self._processes]))
        share = self._shares[index]
        return [self.batch(rows) for rows in [*share, *[[]] * (least - len(share))]]

    def batches(self) -> list[list[int]]:
        """Return the rows of every micro-batch, of all processes, in order."""
        return [rows for share in self._shares for rows in share]

    def batch(self, rows: list[int]) -> Batch:
        """Lay out a micro-batch of these rows; of some row that does not count where there are none.

        Where not all rows are the task's own, `own` (B,) says which are.
        """
        batch = make_batch(self._rows, rows, self._objective, self._shared, self._reference, self._terms)
        if self._own is not None:
            batch["own"] = torch.tensor([row < self._own for row in rows] or [False])
        return batch


class Trainer(TransformersTrainer):  # type: ignore[misc]  # transformers carries no types
    """Trains a policy, or a reward model, on planned micro-batches.

    The loss of an optimiser step is the sum over its rows divided by the step's whole count (rows or response tokens),
    over all micro-batches and processes: accumulation never changes the result.

    Args:
        policy: what learns.
        objective: what a batch teaches.
        arguments: transformers' settings; a process's share of a step is its batch of 1.
        steps: the stage's optimiser steps, in order.
        hooks: what a method does beside the objective; None for nothing.
        callbacks: transformers callbacks.
    """

    def __init__(
        self,
        policy: nn.Module,
        objective: Objective,
        arguments: TrainingArguments,
        steps: Steps,
        hooks: StageHooks | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        watching = [*callbacks, _AroundSteps(self, hooks)]
        # The loader's batch is one item, a process's share of a step, which is collated already.
        only = itemgetter(0)
        super().__init__(model=policy, args=arguments, train_dataset=steps, data_collator=only, callbacks=watching)
        self.remove_callback(PrinterCallback)
        if getattr(policy, "sharded", False):
            # accelerate wraps no model with sharded parameters, and leaves one alone that is wrapped.
            self.model_wrapped = data_parallel(policy, arguments.device)
        self.objective, self._hooks = objective, hooks
        # Says that the loss is divided by the whole step's count already.
        self.model_accepts_loss_kwargs = True
        self._penalty_due = False
        self._step_rows: Tensor | None = None  # over all processes; None where a method adds nothing to rows
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)
        self._counted: dict[str, list[Tensor]] = defaultdict(list)
        self._losses: list[tuple[int, Tensor]] = []

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Collect a step's micro-batches and what its loss is divided by, over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._penalty_due = True
        if not samples:
            return samples, None
        batches = [batch for share in samples for batch in share]
        found = [torch.stack([batch["count"] for batch in batches]).sum()]
        if "counts" in batches[0]:
            found.append(torch.cat([batch["counts"] for batch in batches]).sum())
        count, *rows = (self.accelerator.gather(part.to(device)).sum() for part in found)
        self._step_rows = rows[0] if rows else None
        return samples, count

    def training_step(self, model: nn.Module, inputs: list[Batch], num_items_in_batch: Any = None) -> Tensor:
        """Compute a step's micro-batches one after the other; the processes exchange gradients with the last."""
        loss = torch.zeros((), device=self.args.device)
        for batch in inputs[:-1]:
            with self.accelerator.no_sync(model):
                loss += super().training_step(model, batch, num_items_in_batch)
        loss += super().training_step(model, inputs[-1], num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the micro-batch's share of the step's loss; the step's first one carries the penalty."""
        count = inputs["count"] if num_items_in_batch is None else num_items_in_batch
        if self._hooks is not None and "counts" in inputs:
            loss, metrics = self._loss_with_rows(self._hooks, model, inputs, count)
        else:
            loss, metrics = self.objective.loss(model, inputs, count)
        loss = loss * self.accelerator.num_processes  # the gradients are averaged over the processes
        if self._hooks is not None and self._penalty_due:
            extra = self._hooks.penalty(self.accelerator.unwrap_model(model))
            loss = loss if extra is None else loss + extra
            self._penalty_due = False
        self._losses.append((self.state.global_step + 1, loss.detach()))
        for name, values in metrics.items():
            self._metrics[name].append(values)
            # Which of them count, and are looked at where the device is waited for anyway.
            self._counted[name].append((inputs["count"] > 0).expand(len(values)))
        if "own" in inputs and "margin" in metrics:
            self._metrics["own_margin"].append(metrics["margin"])
            self._counted["own_margin"].append(inputs["own"])
        return (loss, metrics) if return_outputs else loss

    def _loss_with_rows(
        self, hooks: StageHooks, model: nn.Module, batch: Batch, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add to the objective's loss what the method adds for each row, from the same forward pass."""
        seen: list[Tensor] = []

        def remembered(inputs: Batch) -> Tensor:
            seen.append(model(inputs))
            return seen[-1]

        loss, metrics = self.objective.loss(remembered, batch, count)
        rows = hooks.row_loss(seen[-1], batch)
        if rows is None:
            return loss, metrics
        assert self._step_rows is not None  # counted where batches have `counts`
        return loss + (rows * batch["counts"]).sum() / self._step_rows, metrics

    def check_losses(self) -> None:
        """Look at the losses since the last look, of all processes.

        Raises:
            DivergedError: one is NaN or infinite; the message says at which step.
        """
        steps, losses = [step for step, _ in self._losses], [loss for _, loss in self._losses]
        self._losses.clear()
        found = zip(steps, torch.stack(losses).tolist() if losses else [], strict=True)
        own = next(((step, loss) for step, loss in found if not math.isfinite(loss)), None)
        bad = [one for one in gather(own) if one is not None]
        if bad:
            step, loss = min(bad, key=lambda one: one[0])
            raise DivergedError(f"step {step}: the loss became {loss}: lower the learning rate, or train in fp32")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics' means since the last log; only here and before a checkpoint is the device waited for."""
        own = {name: torch.cat(parts)[torch.cat(self._counted[name])].cpu() for name, parts in self._metrics.items()}
        parts = gather(own)
        for name in dict.fromkeys(name for part in parts for name in part):
            # A process may have none of a name.
            values = torch.cat([part[name] for part in parts if name in part])
            logs |= {name: values.mean().item()} if len(values) else {}
        self._metrics.clear()
        self._counted.clear()
        super().log(logs, start_time)


@dataclass(eq=False)
class _AroundSteps(TrainerCallback):  # type: ignore[misc]
    """What happens around the optimiser's steps: the losses are looked at, and a method's hooks are called."""

    trainer: Trainer
    hooks: StageHooks | None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.hooks is not None:
            self.hooks.adjust_gradients(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the losses before anything of a step is logged or saved, and after the last step; call the hooks."""
        if control.should_log or control.should_save or state.global_step >= state.max_steps:
            self.trainer.check_losses()
        if self.hooks is not None:
            self.hooks.after_step(kwargs["model"])


def training_arguments(folder: Path, options: StageOptions, seed: int) -> TrainingArguments:
    """Return transformers' settings for one stage: AdamW, a fresh optimiser, one pass over the plan.

    The warm-up depends on the plan and is set with it.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.scheduler,
        weight_decay=0.0,
        max_grad_norm=options.max_grad_norm,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.checkpoint_steps else "no",
        save_steps=options.checkpoint_steps or 500,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=[],
        log_level="error",
    )
    if arguments.device.type == "cuda":
        # Or transformers would split a batch between all GPUs that one process sees, and with it a pair.
        arguments._n_gpu = 1
    return arguments
