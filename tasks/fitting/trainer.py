"""Trainers: what their checkpoints hold, and the loss of a classifier of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer

from pyra.adapters.adalora import RankAllocation
from pyra.adapters.elastic import RateSampler, StepPart, distillation_loss, uncompressed
from pyra.checkpoints import writing
from pyra.tasks.fitting import checkpoints, processes
from pyra.tasks.fitting.augmentation import Mixing


class Kept(Protocol):
    """State beside the weights that a checkpoint holds."""

    def tensors(self) -> dict[str, Tensor]:
        """Return it."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take it up again."""


class KeepingTrainer(Trainer):
    """Modifications: checkpoints hold what is trained, and whatever is ``kept`` beside it, not the whole model.

    Args:
        make_optimizer: called when the parameters are where they are trained: sharding replaces them.
        kwargs: of ``Trainer``.
    """

    def __init__(self, make_optimizer: Callable[[], torch.optim.Optimizer], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.make_optimizer = make_optimizer
        self.kept: dict[str, Kept] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Whole steps only: with accumulated gradients the last one would else have fewer parts than the others."""
        data = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        whole = len(data) // step * step
        if not self.args.dataloader_drop_last or not whole:
            return super()._get_train_sampler(train_dataset)
        return RandomSampler(data, num_samples=whole)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser."""
        self.optimizer = self.make_optimizer()
        return self.optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Name the checkpoint where it cannot be written."""
        with writing(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, also where layers are sharded, of which ``Trainer`` would write nothing."""
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        inner = self.accelerator.unwrap_model(self.model)
        parts = {"model": checkpoints.trained_tensors(inner)}  # every process: shards are gathered
        parts |= {name: part.tensors() for name, part in self.kept.items()}
        if self.args.should_save:
            checkpoints.write_tensors(Path(output_dir or str(self.args.output_dir)), parts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        parts = checkpoints.read_tensors(Path(resume_from_checkpoint))
        checkpoints.put_back(self.accelerator.unwrap_model(self.model if model is None else model), parts["model"])
        for name, part in self.kept.items():
            part.restore(parts.get(name, {}))


class ImageTrainer(KeepingTrainer):
    """Modifications: the loss is that of a model that maps images to logits.

    It is taken at the rates of the step, and of mixed images where that is asked for.
    """

    sampler: RateSampler | None = None
    distill: bool = False
    ranks: RankAllocation | None = None
    mixing: Mixing | None = None
    smoothing: float = 0.0
    micro_batch: int = 0
    part: StepPart | None = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward passes of a batch, mixed where that is asked for: one, or one for each rate."""
        step = self.state.global_step
        if self.mixing is not None:
            mixed = self.mixing(inputs["pixel_values"], inputs["labels"], step, self.micro_batch, processes.rank())
            inputs = dict(zip(("pixel_values", "labels"), mixed, strict=True))
            self.micro_batch += 1
        if self.sampler is None:
            return super().training_step(model, inputs, num_items_in_batch)
        losses = []
        # Each part is propagated back before the next is switched to: gradient checkpointing computes again.
        for part in self.sampler.parts(step):
            self.part = part
            self.sampler.apply(self.accelerator.unwrap_model(model), part.rate)
            taken = {name: value[part.rows(len(value))] for name, value in inputs.items()}
            losses.append(super().training_step(model, taken, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of ``pixel_values`` [B, 3, S, S] against ``labels`` [B]; with a teacher, divergence from it."""
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        smoothing = 0.0 if self.mixing is not None else self.smoothing
        teacher = None
        if self.distill:
            with uncompressed(self.accelerator.unwrap_model(model)):
                teacher = model(pixels)
        logits = model(pixels)
        heads = logits if isinstance(logits, tuple) else (logits,)  # distilled models train both heads
        loss = torch.stack([F.cross_entropy(head, labels, label_smoothing=smoothing) for head in heads]).mean()
        logits = torch.stack(heads).mean(0)
        if teacher is not None:
            loss = loss + distillation_loss(logits, teacher)
        if self.ranks is not None:
            loss = loss + self.ranks.penalty()
        if self.part is not None:
            loss = self.part.weight * loss
        return (loss, {"logits": logits}) if return_outputs else loss
