"""What pyra changes in trl's trainers, whichever of them it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from pyra.adapters.adalora import RankAllocation
from pyra.adapters.recipe import parameter_groups
from pyra.tasks.fitting.callbacks import MovingRanks
from pyra.tasks.fitting.clock import Clock
from pyra.tasks.fitting.fit import Fitted
from pyra.tasks.fitting.loop import (
    losses_of,
    refuse_broken,
    run_through,
    steps_of,
    tracking,
    training_values,
    where_to_go_on,
)
from pyra.tasks.fitting.trainer import KeepingTrainer
from pyra.tasks.posttraining.options import PostTrainingOptions


class PostTrainer(KeepingTrainer):
    """Modifications: nothing is told to trl's makers over the network, and checkpoints get no card of trl's.

    AdaLoRA's penalty is added to the loss, which trl takes of log-probabilities. It stands before a trainer of trl:
    ``class Own(PostTrainer, SFTTrainer)``.
    """

    ranks: RankAllocation | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        """Return the loss that trl takes of a batch."""
        loss = super().compute_loss(model, inputs, *more, **options)
        return loss if self.ranks is None else loss + self.ranks.penalty() / self.args.gradient_accumulation_steps

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write nothing: the card of a run is pyra's own."""


def fit_with(
    make: Callable[[Callable[[], torch.optim.Optimizer], dict[str, Any]], PostTrainer],
    model: nn.Module,
    options: PostTrainingOptions,
    folder: Path,
    device: torch.device,
    examples: int,
    logged: Sequence[str] = (),
) -> Fitted:
    """Train the weights that require gradients, from the newest complete checkpoint in the folder if there is one.

    Every process of a distributed run calls this.

    Args:
        make: from what makes the optimiser, and what trl's arguments are, to the trainer.
        model: adapted.
        options: of the run.
        folder: of the run.
        device: to train on.
        examples: rows that are trained on.
        logged: names of what the trainer logs that is kept beside the loss.

    Raises:
        ConfigError: for a batch that the processes cannot share.
        TrainingError: where the loss or a trained weight is NaN or infinite.
    """
    clock = Clock()
    saved, resumed = where_to_go_on(folder)

    def optimizer() -> torch.optim.Optimizer:
        groups = parameter_groups(model, options.learning_rate, options.learning_rate)
        return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay)

    with tracking(options, folder), own_forward(model):
        trainer = make(optimizer, _values(options, saved, device, examples))
        trainer.kept["clock"] = clock
        steps_an_epoch, steps = steps_of(trainer, options)
        trainer.ranks = RankAllocation.of(model, options.steps or steps)
        if trainer.ranks is not None:
            trainer.kept["ranks"] = trainer.ranks
            trainer.add_callback(MovingRanks(trainer.ranks))
        run_through(trainer, options, steps_an_epoch, resumed)
    refuse_broken(model)
    return Fitted(clock.seconds(), losses_of(trainer.state, logged), [])


def _values(options: PostTrainingOptions, folder: Path, device: torch.device, examples: int) -> dict[str, Any]:
    values = training_values(options, folder, device, examples)
    # A router that is frozen, or balanced already, is not to be balanced again: trl would, for some mixtures.
    values |= checkpointing(options) | {"router_aux_loss_coef": 0.0}
    return values if options.steps is None else values | {"max_steps": options.steps}


def checkpointing(options: PostTrainingOptions) -> dict[str, bool]:
    """Return whether activations are recomputed, under the name that the installed transformers has for it."""
    names = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: options.gradient_checkpointing}


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Give every module its forward back when the block ends: trl puts one that knows its chunked head in its place."""
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    try:
        yield
    finally:
        for module, forward in before.items():
            if module.__dict__.get("forward") is not forward:
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward
