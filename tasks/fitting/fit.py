"""From an adapted model and its training images to trained weights."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from pyra.adapters.adalora import RankAllocation
from pyra.adapters.elastic import RateSampler
from pyra.adapters.recipe import parameter_groups
from pyra.backbones import set_rate
from pyra.errors import ConfigError
from pyra.tasks.data.images import ImageDataset
from pyra.tasks.fitting import checkpoints
from pyra.tasks.fitting.augmentation import AugmentedImages, Mixing
from pyra.tasks.fitting.averaging import MovingAverage
from pyra.tasks.fitting.callbacks import EpochScores, MovingRanks, StepStart, StopAfter, evaluating, scores_of
from pyra.tasks.fitting.clock import Clock
from pyra.tasks.fitting.loop import (
    losses_of,
    refuse_broken,
    run_through,
    steps_of,
    tracking,
    training_arguments,
    where_to_go_on,
)
from pyra.tasks.fitting.trainer import ImageTrainer
from pyra.tasks.options import RunOptions
from pyra.tasks.probing import FeatureStore, frozen_features, probe_of
from pyra.tasks.runs import DTYPES
from pyra.tasks.scoring import score


@dataclass(frozen=True)
class Watch:
    """A split that is scored at the end of every epoch.

    Attributes:
        data: its images.
        metric: of the task.
        higher_is_better: its direction.
        keep_best: end with the weights of the best epoch instead of the last one's.
        patience: stop after so many epochs without a better score; None trains to the end.
    """

    data: ImageDataset
    metric: str
    higher_is_better: bool = True
    keep_best: bool = False
    patience: int | None = None


@dataclass(frozen=True)
class Fitted:
    """What a training leaves beside the weights.

    Attributes:
        seconds: wall-clock time of the training, with what was trained before an interruption.
        losses: step, epoch, loss and learning rate, every ten steps and at each checkpoint.
        scores: epoch and score of every epoch of a :class:`Watch`.
        kept: the one of them whose weights were kept, where that was asked for.
    """

    seconds: float
    losses: list[dict[str, float]]
    scores: list[tuple[float, float]]
    kept: tuple[float, float] | None = None


def fit(
    model: nn.Module,
    data: ImageDataset,
    options: RunOptions,
    folder: Path,
    device: torch.device,
    *,
    watch: Watch | None = None,
    stop_after: float | None = None,
    store: FeatureStore | None = None,
) -> Fitted:
    """Train the weights that require gradients, from the newest complete checkpoint in the folder if there is one.

    A linear probe is trained on features that are computed once: its backbone stays as it is, and images are not
    augmented. Every process of a distributed run calls this.

    Args:
        model: adapted.
        data: training images.
        options: of the run.
        folder: checkpoints go into a folder of it.
        device: to train on.
        watch: a split to score at the end of every epoch.
        stop_after: end after so many epochs, on the learning rates of all ``options.epochs``.
        store: where features of a probe are kept for the next one.

    Raises:
        ConfigError: for options that do not fit the data, the model or the number of processes.
        TrainingError: where the loss or a trained weight is NaN or infinite.
    """
    clock = Clock()
    saved, resumed = where_to_go_on(folder)
    trained, examples, watched = _what_is_trained(model, data, options, device, watch, store)
    if options.gradient_checkpointing and trained is model:
        _checkpoint_gradients(model)
    arguments = training_arguments(options, saved, device, len(data))

    def optimizer() -> torch.optim.Optimizer:
        groups = parameter_groups(
            model,
            options.lr,
            options.lr if options.reactivation_lr is None else options.reactivation_lr,
            head_lr=options.head_lr,
            layer_decay=options.layer_decay,
        )
        return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)

    with tracking(options, folder):
        trainer = ImageTrainer(optimizer, model=trained, args=arguments, train_dataset=examples)
    steps_an_epoch, steps = steps_of(trainer, options)
    trainer.kept["clock"] = clock
    average = _accompany(trainer, trained, options, steps, len(data.class_names))
    if watch is not None and watched is not None:
        scores = EpochScores(
            trainer,
            trained,
            lambda: _score(trained, watched, watch, options, device, average),
            steps_an_epoch,
            higher_is_better=watch.higher_is_better,
            patience=watch.patience,
            keep_best=watch.keep_best,
        )
        trainer.kept["best"] = scores
        trainer.add_callback(scores)
    if stop_after is not None:
        trainer.add_callback(StopAfter(min(steps, max(1, round(stop_after * steps_an_epoch)))))
    run_through(trainer, options, steps_an_epoch, resumed)
    if average is not None:
        average.settle()
    seen = scores_of(trainer.state)
    kept = None
    if watch is not None and watch.keep_best and scores.best:
        checkpoints.put_back(trained, scores.best)
        kept = max(seen, key=lambda one: one[1] if watch.higher_is_better else -one[1])  # the first of equals
    if options.elastic:
        set_rate(model, options.rates()[-1])
    refuse_broken(model)
    return Fitted(clock.seconds(), losses_of(trainer.state), seen, kept)


def forget_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a training that is finished."""
    shutil.rmtree(folder / checkpoints.FOLDER, ignore_errors=True)


def _what_is_trained(
    model: nn.Module,
    data: ImageDataset,
    options: RunOptions,
    device: torch.device,
    watch: Watch | None,
    store: FeatureStore | None,
) -> tuple[nn.Module, Dataset[dict[str, Any]], Dataset[dict[str, Any]] | None]:
    """Return the module that is trained, its examples, and those that are watched: a probe has features."""
    watched = None if watch is None else watch.data
    head = probe_of(model) if options.method == "linear" else None
    if head is None:
        examples: Dataset[dict[str, Any]] = data
        if options.randaugment is not None:
            examples = AugmentedImages(data, options.randaugment, options.seed)
        return model, examples, watched

    def features(images: ImageDataset) -> Dataset[dict[str, Any]]:
        compute = frozen_features if store is None else store.features
        return compute(model, images, batch_size=options.batch_size, device=device, dtype=DTYPES[options.dtype])

    return head, features(data), None if watched is None else features(watched)


def _accompany(
    trainer: ImageTrainer, trained: nn.Module, options: RunOptions, steps: int, classes: int
) -> MovingAverage | None:
    """Give the trainer what the options ask for beside the plain loss; returns the moving average, if any."""
    trainer.add_callback(StepStart(trainer))
    trainer.smoothing = options.smoothing
    if options.mixup or options.cutmix:
        trainer.mixing = Mixing(options.mixup, options.cutmix, options.smoothing, classes, options.seed)
    if options.elastic:
        trainer.sampler, trainer.distill = RateSampler(options.rates(), seed=options.seed), options.distill
    trainer.ranks = RankAllocation.of(trained, steps)
    if trainer.ranks is not None:
        trainer.kept["ranks"] = trainer.ranks
        trainer.add_callback(MovingRanks(trainer.ranks))
    if options.ema is None:
        return None
    average = MovingAverage(trained, options.ema)
    trainer.kept["average"] = average
    trainer.add_callback(average)
    return average


def _score(
    trained: nn.Module,
    examples: Dataset[dict[str, Any]],
    watch: Watch,
    options: RunOptions,
    device: torch.device,
    average: MovingAverage | None,
) -> float:
    with ExitStack() as stack:
        evaluating(stack, trained)
        if average is not None:
            stack.enter_context(average.in_place())
        if options.elastic:
            set_rate(trained, options.rates()[-1])
        return score(
            trained,
            examples,
            metric=watch.metric,
            batch_size=options.batch_size,
            device=device,
            dtype=DTYPES[options.dtype],
            description=f"{options.label}: scoring",
        )


def _checkpoint_gradients(model: nn.Module) -> None:
    """Recompute activations in the backward pass: less memory, about a third more time."""
    switch: Callable[[], None] | None = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError("--gradient-checkpointing: this backbone has no switch for it")
    switch()


_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` for trackers that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(_TRACKERS[name]) is None]
    if missing:
        raise ConfigError(f"--track {','.join(missing)}: not installed; pip install {' '.join(missing)}")
