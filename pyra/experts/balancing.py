"""Experts kept at work in training without a loss of their own, as DeepSeek-V3's are.

After each step the correction bias of an expert that was given more than its share of the tokens goes down, that of the
others up (arXiv 2408.15664; by 0.001 as in DeepSeek-V3, arXiv 2412.19437, section 4.2).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyra.experts.layers import expert_layers

SPEED = 0.001


class BalancedExperts:
    """Within a ``with`` block counts the tokens of each expert; :meth:`step` moves the biases against them.

    Args:
        model: whose routers have a correction bias, as DeepSeek-V3's have.

    Raises:
        UnsupportedModelError: for a model without experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(expert_layers(model).values())
        self.counts = [torch.zeros(layer.gate.num_experts, dtype=torch.int64) for layer in self.layers]
        self.hooks: list[Any] = []

    def __enter__(self) -> BalancedExperts:
        self.hooks = [
            layer.experts.register_forward_pre_hook(partial(self._count, index))
            for index, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def step(self) -> None:
        """Move the biases, and begin to count anew."""
        for layer, count in zip(self.layers, self.counts, strict=True):
            more = (count.double().mean() - count).sign().to(layer.gate.e_score_correction_bias)
            layer.gate.e_score_correction_bias += SPEED * more
            count.zero_()

    def _count(self, index: int, _: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        self.counts[index] += torch.bincount(arguments[1].flatten(), minlength=len(self.counts[index])).cpu()
