"""What accompanies a training step by step: checkpoints, scores, an end before the end, a bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyra.adapters.adalora import RankAllocation
from pyra.errors import TrainingError
from pyra.tasks.fitting import checkpoints, processes
from pyra.tasks.fitting.augmentation import AugmentedImages
from pyra.tasks.fitting.trainer import ImageTrainer

BETWEEN_LINES = 10.0
"""Seconds, at least, from one line of progress to the next."""


class Sealing(TrainerCallback):
    """Asks for a checkpoint at the end of every epoch, and declares one complete when every process wrote its part.

    The loss is logged before each: a training that goes on from it averages over the same steps.
    """

    def __init__(self, steps_an_epoch: int) -> None:
        self.steps_an_epoch = steps_an_epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for one."""
        if state.global_step % self.steps_an_epoch == 0 or state.global_step == state.max_steps:
            control.should_save = True
        control.should_log |= control.should_save

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seal it."""
        processes.wait()
        if processes.is_main():
            checkpoints.seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


class StepStart(TrainerCallback):
    """Tells augmentation where the training stands."""

    def __init__(self, trainer: ImageTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Name the epoch; a resumed one goes on with its own."""
        if isinstance(self.trainer.train_dataset, AugmentedImages):
            self.trainer.train_dataset.epoch = int(state.epoch or 0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count the batches of a step from 0."""
        self.trainer.micro_batch = 0


class MovingRanks(TrainerCallback):
    """AdaLoRA's ranks move after each optimiser step."""

    def __init__(self, ranks: RankAllocation) -> None:
        self.ranks = ranks

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move them while the gradients are there."""
        self.ranks.update(state.global_step + 1)


class EpochScores(TrainerCallback):
    """Scores the model at the end of every epoch, as it would be deployed but for the folding.

    Args:
        trainer: whose log the scores enter: ``{"score": value}``.
        model: that is trained.
        score: scores it.
        steps_an_epoch: optimiser steps.
        higher_is_better: the direction of the score.
        patience: stop after so many epochs without a better score.
        keep_best: remember the weights of the best epoch, the first of equals.
    """

    def __init__(
        self,
        trainer: ImageTrainer,
        model: nn.Module,
        score: Callable[[], float],
        steps_an_epoch: int,
        *,
        higher_is_better: bool = True,
        patience: int | None = None,
        keep_best: bool = False,
    ) -> None:
        self.trainer, self.model, self.score = trainer, model, score
        self.steps_an_epoch, self.sign = steps_an_epoch, 1 if higher_is_better else -1
        self.patience, self.keep_best = patience, keep_best
        self.best: dict[str, Tensor] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Score at the end of an epoch, before the checkpoint is written."""
        if state.global_step % self.steps_an_epoch and state.global_step != state.max_steps:
            return
        earlier = [self.sign * value for _, value in scores_of(state)]
        value = self.sign * self.score()
        self.trainer.log({"score": self.sign * value})
        if not earlier or value > max(earlier):
            if self.keep_best:
                self.best = checkpoints.trained_tensors(self.model)
        elif self.patience is not None and len(earlier) - earlier.index(max(earlier)) >= self.patience:
            control.should_training_stop = True

    def tensors(self) -> dict[str, Tensor]:
        """Return the best weights so far."""
        return self.best

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the best weights up again."""
        self.best = dict(tensors)


def scores_of(state: TrainerState) -> list[tuple[float, float]]:
    """Return epoch and score of every epoch that was scored."""
    return [(entry["epoch"], entry["score"]) for entry in state.log_history if "score" in entry]


class StopAfter(TrainerCallback):
    """Ends the training after so many epochs of a schedule that is longer."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop at the step."""
        if state.global_step >= self.step:
            control.should_training_stop = True


class ProgressBar(TrainerCallback):
    """One tqdm bar a run, with the loss beside it; where nobody watches a terminal, a line now and then."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: Any = None
        self.told, self.step = time.monotonic(), -1  # of the last line

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        done, steps = state.global_step, state.max_steps
        self.bar = tqdm(total=steps, initial=done, desc=self.description, unit="step", leave=False, disable=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance by one step."""
        self.bar.update(1)
        if time.monotonic() - self.told > BETWEEN_LINES:
            self._tell(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest loss, and stop where it is no number any more."""
        if logs and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise TrainingError(
                    f"the loss is {logs['loss']} at step {state.global_step}: training diverged; lower --lr"
                    + (" or use --dtype bfloat16" if args.fp16 else "")
                )
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", epoch=f"{state.epoch:.1f}")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say where the training is, where no bar does."""
        if time.monotonic() - self.told > BETWEEN_LINES:
            self._tell(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()
        self._tell(state)

    def _tell(self, state: TrainerState) -> None:
        if not self.bar.disable or not processes.is_main() or self.step == state.global_step:
            return
        loss, reward = (_newest(state, name) for name in ("loss", "reward"))
        where = f"step {state.global_step} of {state.max_steps}, epoch {state.epoch or 0:.1f}"
        how = f"loss {loss:.3f}" if math.isnan(reward) else f"reward {reward:.3f}"
        print(f"{self.description}: {where}, {how}", file=sys.stderr, flush=True)
        self.told, self.step = time.monotonic(), state.global_step


def evaluating(stack: ExitStack, model: nn.Module) -> None:
    """Put a model into evaluation mode until the stack ends, each module then as it was."""
    modes = [(module, module.training) for module in model.modules()]

    def back() -> None:
        for module, mode in modes:
            module.training = mode

    stack.callback(back)
    model.eval()


def _newest(state: TrainerState, name: str) -> float:
    """Return what was logged last under a name; NaN where nothing was."""
    return float(next((entry[name] for entry in reversed(state.log_history) if name in entry), math.nan))
