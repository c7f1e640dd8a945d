"""What a training on ``transformers.Trainer`` has in common, whatever the model reads."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerState, TrainingArguments

from pyra.errors import TrainingError
from pyra.tasks.fitting import checkpoints, processes
from pyra.tasks.fitting.callbacks import ProgressBar, Sealing
from pyra.tasks.fitting.trainer import KeepingTrainer

_LOGGED = ("step", "epoch", "loss", "learning_rate")


class LoopOptions(Protocol):
    """The options of a run that the loop itself reads."""

    epochs: float
    batch_size: int
    accumulate: int
    save_steps: int
    track: tuple[str, ...]
    output: str
    seed: int
    device: str
    dtype: str

    @property
    def label(self) -> str:
        """What tables call the method."""


def where_to_go_on(folder: Path) -> tuple[Path, Path | None]:
    """Return the folder of a run's checkpoints, and its newest complete one; what is half written is removed."""
    saved = folder / checkpoints.FOLDER
    processes.on_main(lambda: checkpoints.drop_incomplete(saved))
    newest = checkpoints.newest(saved)
    if newest is not None and processes.is_main():
        print(f"goes on from step {newest.name.rpartition('-')[2]}", file=sys.stderr)
    return saved, newest


def training_arguments(options: LoopOptions, folder: Path, device: torch.device, examples: int) -> TrainingArguments:
    """Return what ``transformers.Trainer`` is told; arguments as of :func:`training_values`."""
    return TrainingArguments(**training_values(options, folder, device, examples))


def training_values(options: LoopOptions, folder: Path, device: torch.device, examples: int) -> dict[str, Any]:
    """Return by name what a trainer is told, whatever class of arguments it takes.

    Args:
        options: of the run.
        folder: for checkpoints.
        device: to train on.
        examples: number of training examples.
    """
    return {
        "output_dir": str(folder),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": processes.batch_of_each(options.batch_size, options.accumulate),
        "gradient_accumulation_steps": options.accumulate,
        "dataloader_drop_last": examples >= options.batch_size,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.01, "warmup_lr_rate": 0.001},
        "warmup_steps": 0.1,
        "logging_steps": 10,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is no number must be seen
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "save_total_limit": 2,  # the one being written, and the one before it
        "report_to": list(options.track) or "none",
        "run_name": options.output,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": device.type == "cpu",
        "bf16": options.dtype == "bfloat16",
        "fp16": options.dtype == "float16",
        "seed": options.seed,
        "dataloader_pin_memory": device.type != "cpu",
        "ddp_find_unused_parameters": True,  # a layer that removes nothing at a rate leaves its re-activation unused
    }


def steps_of(trainer: KeepingTrainer, options: LoopOptions) -> tuple[int, int]:
    """Return the optimiser steps of an epoch, and of the whole training."""
    steps_an_epoch = math.ceil(len(trainer.get_train_dataloader()) / options.accumulate)
    return steps_an_epoch, math.ceil(options.epochs * steps_an_epoch)


def run_through(trainer: KeepingTrainer, options: LoopOptions, steps_an_epoch: int, resumed: Path | None) -> None:
    """Train with a bar and sealed checkpoints.

    Args:
        trainer: with every other callback.
        options: of the run.
        steps_an_epoch: optimiser steps, of :func:`steps_of`.
        resumed: checkpoint to go on from, of :func:`where_to_go_on`.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    progress = ProgressBar(f"{options.label}: training")
    trainer.add_callback(progress)
    # Last: the others have logged what belongs into the checkpoint.
    trainer.add_callback(Sealing(steps_an_epoch))
    try:
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    finally:
        if progress.bar is not None:
            progress.bar.close()


def refuse_broken(model: nn.Module) -> None:
    """Raise :class:`TrainingError` where a trained weight is NaN or infinite."""
    broken = [name for name, tensor in checkpoints.trained_tensors(model).items() if not tensor.isfinite().all()]
    if broken:
        raise TrainingError(f"{len(broken)} trained tensors hold NaN or infinities ({broken[0]}): lower --lr")


def losses_of(state: TrainerState, more: Sequence[str] = ()) -> list[dict[str, float]]:
    """Return step, epoch, loss and learning rate of every logged step, and ``more`` that was logged."""
    names = (*_LOGGED, *more)
    return [{key: entry[key] for key in names if key in entry} for entry in state.log_history if "loss" in entry]


@contextmanager
def tracking(options: LoopOptions, folder: Path) -> Iterator[None]:
    """Let a trainer that is made here write for TensorBoard into ``logs`` of the folder, unless told otherwise."""
    name = "TENSORBOARD_LOGGING_DIR"
    if "tensorboard" not in options.track or name in os.environ:
        yield
        return
    os.environ[name] = str(folder / "logs")
    try:
        yield
    finally:
        with contextlib.suppress(KeyError):
            del os.environ[name]
