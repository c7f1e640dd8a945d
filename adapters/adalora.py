"""AdaLoRA inside a training loop (arXiv 2303.10512): what PEFT leaves to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraModel
from torch import Tensor, nn

from pyra.errors import ConfigError

_SENSITIVITIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankAllocation:
    """The ranks of an adapted model over a training of known length, and the regularisation of its factors.

    Ranks are full for the first tenth of the steps, then fall to the target until the last three tenths, which train
    what is left. PEFT adds the regularisation only to models that return their own loss.

    Args:
        model: adapted with AdaLoRA.
        steps: optimiser steps of the training.

    Raises:
        ConfigError: for fewer than two steps: there is nothing to allocate by.
    """

    def __init__(self, model: Any, steps: int) -> None:
        if steps < 2:
            raise ConfigError(f"AdaLoRA needs two training steps at least, this training has {steps}: train longer")
        self.tuner = model.base_model
        self.config = self.tuner.peft_config[self.tuner.trainable_adapter_name]
        self.config.tinit, self.config.tfinal = steps // 10, steps * 3 // 10
        self.config.deltaT = max(1, steps // 50)
        self.tuner.rankallocator.set_total_step(steps)
        self.config.total_step = steps

    @classmethod
    def of(cls, model: nn.Module, steps: int) -> RankAllocation | None:
        """Return the allocation of a model, or None where its method is another."""
        return cls(model, steps) if isinstance(getattr(model, "base_model", None), AdaLoraModel) else None

    def update(self, step: int) -> None:
        """Move the ranks after optimiser step ``step``, counted from 1, and before gradients are cleared."""
        self.tuner.update_and_allocate(step)

    def penalty(self) -> Tensor:
        """Return what is added to the loss: how far the factors are from orthogonal rows and columns, weighted."""
        found = []
        for name, factor in self.tuner.named_parameters():
            if "lora_A." in name or "lora_B." in name:
                gram = (factor @ factor.T if "lora_A." in name else factor.T @ factor).float()
                found.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        weighted: Tensor = self.config.orth_reg_weight * torch.stack(found).mean()
        return weighted

    def tensors(self) -> dict[str, Tensor]:
        """Return what the next allocation goes by, for a checkpoint: the sensitivities so far."""
        allocator = self.tuner.rankallocator
        return {
            f"{kind}/{name}": value.detach().cpu().clone()
            for kind in _SENSITIVITIES
            for name, value in getattr(allocator, kind).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what a checkpoint kept."""
        device = next(self.tuner.parameters()).device
        for kind in _SENSITIVITIES:
            setattr(self.tuner.rankallocator, kind, {})
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            getattr(self.tuner.rankallocator, kind)[name] = value.to(device)
