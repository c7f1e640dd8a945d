"""What pyra changes in trl's trainers, whichever of them it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyra.tasks.fitting.loop import training_values
from pyra.tasks.fitting.trainer import KeepingTrainer
from pyra.tasks.posttraining.options import PostTrainingOptions


class PostTrainer(KeepingTrainer):
    """Modifications: nothing is told to trl's makers over the network, and checkpoints get no card of trl's.

    It stands before a trainer of trl: ``class Own(PostTrainer, SFTTrainer)``.
    """

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write nothing: the card of a run is pyra's own."""


def post_training_values(
    options: PostTrainingOptions, folder: Path, device: torch.device, examples: int
) -> dict[str, Any]:
    """Return by name what a trainer of trl is told; arguments as of :func:`training_values`."""
    values = training_values(options, folder, device, examples)
    values |= {"gradient_checkpointing": options.gradient_checkpointing, "disable_tqdm": True}
    return values if options.steps is None else values | {"max_steps": options.steps}


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
