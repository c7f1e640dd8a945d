"""A model as if it had fewer experts, or sent tokens to fewer of them, and afterwards as it was: to compare choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyra.errors import ConfigError, UnsupportedModelError
from pyra.experts.layers import expert_layers
from pyra.experts.pruning import BIAS, pruning_problems, set_active_experts


@contextmanager
def only_experts(
    model: nn.Module, kept: Tensor | Sequence[Sequence[int]] | None = None, active: int | None = None
) -> Iterator[nn.Module]:
    """Within the block no token is sent to an expert that is not kept; no weight is copied or changed.

    The outputs are those of :func:`~pyra.experts.prune_experts`, the memory that of the whole model.

    Args:
        model: whose routers have a correction bias, as DeepSeek-V3's have.
        kept: [L, K] numbers of the experts; None keeps all.
        active: experts of a token; None leaves their number.

    Raises:
        ConfigError: for experts that cannot stay, or a number that a layer does not have.
        UnsupportedModelError: for routers without a correction bias.
    """
    gates = [layer.gate for layer in expert_layers(model).values()]
    config: Any = model.config
    before, told = [gate.top_k for gate in gates], config.num_experts_per_tok
    biases: list[Tensor] = [getattr(gate, BIAS) for gate in gates if hasattr(gate, BIAS)]
    if len(biases) < len(gates):
        raise UnsupportedModelError(f"{type(model).__name__}: its routers have no {BIAS} to close experts with")
    try:
        if active is not None:
            set_active_experts(model, active)
        if kept is not None:
            kept = torch.as_tensor(kept)
            if problems := pruning_problems(list(expert_layers(model).values()), kept):
                raise ConfigError("; ".join(problems))
            for gate, bias, index in zip(gates, biases, kept, strict=True):
                closed = torch.full_like(bias, float("-inf"))
                closed[index.to(bias.device)] = bias[index.to(bias.device)]
                setattr(gate, BIAS, closed)
        yield model
    finally:
        for gate, top_k, bias in zip(gates, before, biases, strict=True):
            gate.top_k = top_k
            setattr(gate, BIAS, bias)
        config.num_experts_per_tok = told
